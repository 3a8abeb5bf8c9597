"""The released model's numbers, each stated once with its source.

Sources: Nexus-Gen, arXiv 2504.21356, and its released code (github.com/modelscope/Nexus-Gen, `modeling/`,
`train/`, July 2025); Qwen2.5-VL-7B and FLUX.1-dev configurations as published on their model pages.
Everything else is computed from these (252 // 28 == 9 tokens on a side, 9 * 9 == 81 tokens).
"""

PATCH_SIZE = 14  # Qwen2.5-VL vision tower, pixels on a side
MERGE_SIZE = 2  # patches merged on a side into one token
TARGET_SIZE = 252  # pixels: image that the autoregressive model learns to predict
REFERENCE_SIZE = 504  # pixels: image edited from, as the editing decoder sees it
HIDDEN_SIZE = 3584  # Qwen2.5-VL-7B, numbers of one embedding
MIN_INPUT_PIXELS = 56 * 56  # Qwen2.5-VL image processor
MAX_INPUT_PIXELS = 262_640  # user's images; Nexus-Gen training and inference scripts

TOKEN_LOSS_WEIGHT = 3.0  # on cross entropy; Nexus-Gen training
IMAGE_LOSS_WEIGHT = 3.0  # on 0.5 * MSE + 0.5 * (1 - cosine)

SCHEDULER_SHIFT = 3.0  # FLUX-style time shift in training and sampling of both decoders
NUM_TRAIN_TIMESTEPS = 1000
GUIDANCE_SCALE = 3.5  # FLUX's distilled guidance, embedded
GENERATION_TRUE_CFG_SCALE = 3.0  # two-pass guidance of the generation decoder at inference
EDITING_TRUE_CFG_SCALE = 1.0
NUM_INFERENCE_STEPS = 50
MAX_OUTPUT_PIXELS = 2048 * 2048  # of a picture; FLUX.1 [dev] was trained at up to 2 million

SYSTEM_PROMPT = "You are a helpful assistant."
