"""Versions of one model on one copy of its weights: each says what it says when it is merged, in any company."""

import copy

import numpy as np
import pytest
import test_replies
import torch
from test_replies import assert_same_reply, decided_length, random_prompt, random_sampling, relative
from test_reply_engine import MAX_LENGTH, assert_same_bits, finish, run_in_company

from nexusgen.errors import ModelError
from nexusgen.memory import unique_bytes
from nexusgen.replies import generate_replies
from nexusgen.reply_engine import ReplyEngine
from nexusgen.variants import Variants

tokenizer = test_replies.tokenizer
model = test_replies.model

LAYERS = "qwen.model.language_model.layers."
# Unlike in rank, scale and layers.
FIRST = (3, 2.0, ["0.self_attn.q_proj", "1.self_attn.v_proj", "0.mlp.down_proj", "1.mlp.down_proj"])
SECOND = (5, 0.5, ["0.self_attn.q_proj", "0.self_attn.o_proj", "1.mlp.up_proj"])


def make_adapter(model, seed, rank, layers):
    """Random A, B and parts trained in full, large enough to change what is said."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        out, into = model.get_submodule(LAYERS + layer).weight.shape
        tensors[f"{LAYERS}{layer}.lora_A.default.weight"] = 0.2 * torch.randn(rank, into, generator=generator)
        tensors[f"{LAYERS}{layer}.lora_B.default.weight"] = 0.2 * torch.randn(out, rank, generator=generator)
    for name in ("vision_head.weight", "image_prefill_embeds.weight"):
        weight = model.get_parameter(name)
        tensors[name] = weight + weight.std() * torch.randn(weight.shape, generator=generator)
    return tensors


def merge(model, tensors, scale):
    """The version as a whole model of its own."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith(".lora_A.default.weight"):
                layer = name.removesuffix(".lora_A.default.weight")
                up = tensors[f"{layer}.lora_B.default.weight"]
                merged.get_submodule(layer).weight += scale * (up.double() @ tensor.double()).float()
            elif "lora" not in name:
                merged.get_parameter(name).copy_(tensor)
    return merged


@pytest.fixture
def versions(model):
    """A copy of the base with two adapters on it; by name of the version, what it is as a model of its own."""
    shared = copy.deepcopy(model)
    variants, whole = Variants(shared), {None: model}
    for seed, (name, (rank, scale, layers)) in enumerate({"first": FIRST, "second": SECOND}.items()):
        tensors = make_adapter(model, seed, rank, layers)
        variants.add(name, tensors, scale)
        whole[name] = merge(model, tensors, scale)
    return shared, variants, whole


@pytest.mark.parametrize("deterministic", [False, True])
def test_versions_in_one_batch_say_what_they_say_merged_and_alone(versions, tokenizer, deterministic):
    shared, variants, whole = versions
    rng = np.random.default_rng(7)
    names = [None, "first", "second"] * 15
    requests = [(random_prompt(tokenizer, rng), random_sampling(rng), name) for name in names]
    engine = ReplyEngine(shared, tokenizer, 6, MAX_LENGTH, deterministic=deterministic, variants=variants)
    num_images = num_decided = num_tokens = 0
    farthest = 0.0
    others = 0
    for (prompt, params, name), pieces in zip(requests, run_in_company(engine, requests, rng), strict=True):
        reply = pieces[-1].reply
        (alone,) = generate_replies(whole[name], [prompt], [params], tokenizer, keep_logits=True)
        assert_same_reply(whole[name], reply, alone)
        decided = decided_length(whole[name], alone)
        num_decided += decided
        num_tokens += len(alone.token_ids)
        num_images += len(alone.images)
        if decided == len(alone.token_ids):
            pairs = zip(reply.images, alone.images, strict=True)
            farthest = max([farthest, *(relative(got, want) for got, want in pairs)])
        if name is not None:  # it is another model than the base
            (of_base,) = generate_replies(whole[None], [prompt], [params], tokenizer)
            others += of_base.token_ids != alone.token_ids
    print(f"embeddings differ by {farthest:.1e} of the largest at most; {num_images} images")
    assert farthest <= 1e-5
    assert num_images > 20
    assert num_decided > 0.95 * num_tokens
    assert others > 15


def test_deterministic_versions_are_equal_in_every_bit_alone_and_in_company(versions, tokenizer):
    shared, variants, _ = versions
    rng = np.random.default_rng(8)
    requests = [(random_prompt(tokenizer, rng), random_sampling(rng), name) for name in [None, "first", "second"] * 10]
    engine = ReplyEngine(shared, tokenizer, 5, MAX_LENGTH, deterministic=True, variants=variants)
    in_company = run_in_company(engine, requests, rng)
    fresh = ReplyEngine(shared, tokenizer, 5, MAX_LENGTH, deterministic=True, variants=variants)
    for request, pieces in zip(requests, in_company, strict=True):
        (alone,) = finish(fresh, fresh.join(*request))
        assert_same_bits(pieces[-1].reply, alone)


def test_memory_grows_by_the_adapter_and_shrinks_again(model, tokenizer):
    shared = copy.deepcopy(model)
    variants = Variants(shared)
    of_base = unique_bytes(variants.tensors())
    assert of_base == unique_bytes(model.state_dict().values())
    prompt, params = random_prompt(tokenizer, np.random.default_rng(0)), random_sampling(np.random.default_rng(0))
    engine = ReplyEngine(shared, tokenizer, 2, MAX_LENGTH, deterministic=True, variants=variants)
    (before,) = finish(engine, engine.join(prompt, params))
    sizes = []
    for seed, (name, (rank, scale, layers)) in enumerate({"first": FIRST, "second": SECOND}.items()):
        tensors = make_adapter(model, seed, rank, layers)
        variants.add(name, tensors, scale)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert unique_bytes(variants.tensors()) == of_base + sum(sizes)
    (beside,) = finish(engine, engine.join(prompt, params))
    for name in ("first", "second"):  # in the order in which they came, so that the active one of peft's goes first
        variants.remove(name)
    assert unique_bytes(variants.tensors()) == of_base
    assert shared.state_dict().keys() == model.state_dict().keys()
    (after,) = finish(engine, engine.join(prompt, params))
    assert_same_bits(beside, before)
    assert_same_bits(after, before)
    variants.add("again", make_adapter(model, 0, *FIRST[::2]), FIRST[1])
    assert finish(engine, engine.join(prompt, params, "again"))
    with pytest.raises(KeyError):
        engine.join(prompt, params, "first")


def test_what_does_not_fit_is_named_and_changes_nothing(model):
    shared = copy.deepcopy(model)
    variants = Variants(shared)
    good = make_adapter(model, 0, *FIRST[::2])
    down = f"{LAYERS}0.self_attn.q_proj.lora_A.default.weight"
    cases = [
        ({name: tensor for name, tensor in good.items() if name != down}, r"not whole.*q_proj"),
        ({name: tensor for name, tensor in good.items() if "lora" in name}, r"not whole.*vision_head"),
        (good | {"odd": torch.zeros(1)}, r"not whole.*odd"),
        (good | {down: torch.zeros(3, 31)}, r"q_proj: A and B are \(\(3, 31\), \(32, 3\)\), wanted \(\(3, 32\)"),
        (
            good | {"vision_head.weight": torch.zeros(32, 31)},
            r"vision_head.weight: it is \(32, 31\), wanted",
        ),
        ({name.replace("layers.0.", "layers.7."): tensor for name, tensor in good.items()}, r"layers\.7\..*lacks"),
    ]
    for tensors, message in cases:
        with pytest.raises(ModelError, match=message):
            variants.add("bad", tensors, 1.0)
    assert shared.state_dict().keys() == model.state_dict().keys()
    variants.add("good", good, 1.0)
    with pytest.raises(ModelError, match="good is on the model already"):
        variants.add("good", good, 1.0)
