"""kvtier-run's logits against an independent implementation: transformers on torch, same GGUF file.

test: timeout_s=400

How close they must be is derived in the test itself, from transformers in double precision:

* `--kv-dtype f32`: both compute in f32 from the same dequantized weights (ours exactly, see
  test_dequant.py) and differ in the order of their sums only. transformers' own f32 run is off from
  the double one by some E; ours may be off by FACTOR * E. The factor allows for other orders (ours
  sums in vectors of 16, merges attention by splits), not for another precision.
* `--kv-dtype f16`, the default: K and V are rounded to 11 bits. How much that changes the logits is
  measured by rounding them so in the double run: some H. Ours may be off by FACTOR * (H + E).

Greedy tokens must be the double run's, wherever its best two logits are further apart than what ours
may be off by.
"""
import copy
import functools
import json
import os
import subprocess

import numpy
import pytest

torch = pytest.importorskip("torch", reason="no torch; run `make venv-torch`")
transformers = pytest.importorskip("transformers", reason="no transformers; run `make venv-torch`")

BIN = os.environ.get("KVT_BIN", "build/release/bin")
MODEL = os.environ.get("KVT_MODEL", "build/model/SmolLM2-135M-Instruct.Q4_1.gguf")
CHUNK = 128
GENERATE = 24
FACTOR = 2
TEXT = ("This General Public License does not permit incorporating your program into proprietary "
        "programs. 1. Source code: the preferred form of the work for making modifications to it.\n\n"
        "Déjà vu: 3.14159, naïve façade. def f(x): return [y ** 2 for y in range(x)]\n") * 8


class RoundedCache(transformers.DynamicCache):
    """K and V as f16 holds them."""

    def update(self, key_states, value_states, *args, **kwargs):
        key_states, value_states = (t.half().to(t.dtype) for t in (key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)


@pytest.fixture(scope="module")
def model():
    if not os.path.exists(MODEL):
        pytest.skip("no model; run `make model`")
    torch.set_num_threads(os.cpu_count() or 1)
    return transformers.AutoModelForCausalLM.from_pretrained(
        os.path.dirname(MODEL), gguf_file=os.path.basename(MODEL), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    if not os.path.exists(MODEL):
        pytest.skip("no model; run `make model`")
    folder = tmp_path_factory.mktemp("logits")
    (folder / "prompt.txt").write_text(TEXT, encoding="utf-8")
    runs = {}
    for dtype in ("f32", "f16"):
        done = subprocess.run(
            [os.path.join(BIN, "kvtier-run"), "--model", MODEL, "--local", "--json", "--ignore-end",
             "--prompt-file", str(folder / "prompt.txt"), "--chunk", str(CHUNK), "-n", str(GENERATE),
             "--kv-dtype", dtype, "--dump-logits", str(folder / dtype)],
            stdout=subprocess.PIPE, timeout=200, check=True)
        result = json.loads(done.stdout)
        logits = numpy.fromfile(folder / dtype, dtype=numpy.float32)
        runs[dtype] = result, logits
    return runs


@pytest.fixture(scope="module")
def prompt():
    """Ids by our own tokenizer, which test_tokenizer.py compares with another."""
    tool = os.path.join(os.environ.get("KVT_BUILD", "build/release"), "tests/unit/tokenizer_tool")
    data = TEXT.encode()
    done = subprocess.run([tool, MODEL], input=len(data).to_bytes(4, "little") + data,
                          stdout=subprocess.PIPE, check=True)
    return [int(word) for word in done.stdout.split()]


def positions_of(prompt):
    """Whose logits kvtier-run writes: the last token of each chunk, then each that it appends."""
    chunks = list(range(CHUNK - 1, len(prompt) - 1, CHUNK)) + [len(prompt) - 1]
    return chunks + list(range(len(prompt), len(prompt) + GENERATE - 1))


def make_double(model):
    """Double precision throughout: these two modules compute in f32 whatever the weights are."""
    exact = copy.deepcopy(model)
    torch.nn.Module.double(exact)
    for module in exact.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = functools.partial(norm, module)
        if type(module).__name__ == "LlamaRotaryEmbedding":
            module.forward = functools.partial(turn, exact.config)
    return exact


def norm(module, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight


def turn(config, x, position_ids):
    assert config.rope_parameters["rope_type"] == "default"
    dim = config.head_dim
    powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    angles = position_ids[..., None].double() / config.rope_parameters["rope_theta"] ** powers
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def logits_of(model, ids, positions, cache=None):
    with torch.inference_mode():
        out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True,
                    logits_to_keep=torch.tensor(positions))
    return out.logits[0].double().numpy()


@pytest.fixture(scope="module")
def references(model, ours, prompt):
    """By dtype: logits in double, E and H of the module's comment."""
    found = {}
    double = make_double(model)
    for dtype in ours:
        ids = prompt + ours[dtype][0]["rows"][0]["ids"][:-1]
        positions = positions_of(prompt)
        single = logits_of(model, ids, positions)
        exact = logits_of(double, ids, positions)
        rounded = logits_of(double, ids, positions, RoundedCache(config=model.config))
        found[dtype] = exact, numpy.abs(single - exact).max(), numpy.abs(rounded - exact).max()
    return found


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_logits_agree(ours, references, prompt, dtype):
    exact, e, h = references[dtype]
    logits = ours[dtype][1].reshape(exact.shape[0], -1).astype(numpy.float64)
    assert ours[dtype][0]["prompt_tokens"] == len(prompt) > 4 * CHUNK
    assert logits.shape == exact.shape
    off = numpy.abs(logits - exact).max(axis=1)
    allowed = FACTOR * (e + (h if dtype == "f16" else 0))
    print(f"{dtype}: largest difference {off.max():.3g} of logits up to {numpy.abs(exact).max():.3g}, "
          f"mean {numpy.abs(logits - exact).mean():.3g}; E {e:.3g}, H {h:.3g}, allowed {allowed:.3g}")
    assert 0 < off.max() <= allowed


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_greedy_tokens_agree(ours, references, dtype):
    exact, e, h = references[dtype]
    allowed = FACTOR * (e + (h if dtype == "f16" else 0))
    tokens = ours[dtype][0]["rows"][0]["ids"]
    clear = 0
    for chosen, logits in zip(tokens, exact[-GENERATE:]):
        best = numpy.sort(logits)[-2:]
        if best[1] - best[0] > 2 * allowed:
            clear += 1
            assert chosen == int(logits.argmax())
    assert clear >= GENERATE // 2
