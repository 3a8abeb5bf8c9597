"""Opens a model folder as a stranger would: transformers and diffusers alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import sys
from pathlib import Path
import torch
from diffusers import AutoModel, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

folder = Path(sys.argv[1])
model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "autoregressive", output_loading_info=True)
assert not info["missing_keys"], info["missing_keys"]
assert set(info["unexpected_keys"]) == {"vision_head.weight", "image_prefill_embeds.weight"}, info["unexpected_keys"]
tokenizer = AutoTokenizer.from_pretrained(folder / "autoregressive")
text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
assert text.endswith("<|im_start|>assistant\\n"), text
transformer = FluxTransformer2DModel.from_pretrained(folder / "decoders" / "generation" / "transformer")
autoencoder = AutoModel.from_pretrained(str(folder / "vae"), trust_remote_code=True)
FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
latents = autoencoder.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
assert autoencoder.decode(latents).sample.shape == (1, 3, 64, 64)
assert latents.shape[1] * 4 == transformer.config.in_channels
ids = tokenizer(text, return_tensors="pt").input_ids
assert model(input_ids=ids).logits.isfinite().all()
assert "nexusgen" not in sys.modules
print("opened")
"""


def open_with_plain_libraries(folder: Path, scratch: Path) -> None:
    """Language model, tokenizer, transformer, autoencoder and scheduler, in a process that can't see this project."""
    command = [sys.executable, "-W", "ignore", "-c", _SCRIPT, str(folder)]
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(scratch), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("opened")
