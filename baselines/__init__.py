"""The methods that come with the benchmark. A name lives here and in its record; a test keeps the two equal."""

METHODS: dict[str, str] = {
    "start": "baselines.sft:START",
    "sft": "baselines.sft:SFT",
    "sft-continued": "baselines.sft:SFT_CONTINUED",
    "spin": "baselines.pairwise:SPIN",
    "dpo": "baselines.pairwise:DPO",
    "gsil-logistic": "baselines.gsil:LOGISTIC",
    "gsil-brier": "baselines.gsil:BRIER",
    "gsil-hinge": "baselines.gsil:HINGE",
    "gsil-kliep": "baselines.gsil:KLIEP",
    "gsil-lsif": "baselines.gsil:LSIF",
    "gsil-exponential": "baselines.gsil:EXPONENTIAL",
    "space": "baselines.space:SPACE",
    "ipo": "baselines.ipo:IPO",
    "simpo": "baselines.simpo:SIMPO",
    "dft": "baselines.dft:DFT",
    "gem": "baselines.gem:GEM",
    "neftune": "baselines.neftune:NEFTUNE",
    "sft-occupancy": "baselines.occupancy:SFT_OCCUPANCY",
    "iq-learn": "baselines.iq_learn:IQ_LEARN",
    "airl-reverse-kl": "baselines.adversarial:AIRL",
    "gail-js": "baselines.adversarial:GAIL",
    "airl-reverse-kl-tokens": "baselines.adversarial:AIRL_TOKENS",
    "gail-js-tokens": "baselines.adversarial:GAIL_TOKENS",
}
"""Name → "module:ATTRIBUTE" of its Method."""
