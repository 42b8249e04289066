"""kvtier-run from outside: what it says about wrong input, and that its bits depend on nothing else.

test: timeout_s=200

All with --local: the daemon has tests of its own.
"""
import json
import os
import re
import signal
import subprocess
import time

import gguf
import numpy
import pytest

BIN = os.path.join(os.environ.get("KVT_BIN", "build/release/bin"), "kvtier-run")
MODEL = os.environ.get("KVT_MODEL", "build/model/SmolLM2-135M-Instruct.Q4_1.gguf")
WIDTH, HIDDEN, HEADS, KV_HEADS, VOCABULARY = 64, 128, 4, 2, 300
TINY = ["--random", "tiny", "--local"]


def run(*arguments, status=0, timeout=60):
    done = subprocess.run([BIN, *map(str, arguments)], capture_output=True, timeout=timeout,
                          check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


# ---------------------------------------------------------------- a small model as a file


def write_model(path, architecture="llama", tokenizer=True, skip=(), shapes=None, extra=None,
                rope_factors=None):
    """A Llama model of two layers with random weights, whole or with something wrong."""
    rng = numpy.random.default_rng(3)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    for add, value in (extra or {}).items():
        getattr(writer, add)(value)
    if tokenizer:
        letters = [chr(c) for c in range(33, 127)] + ["ab"]
        tokens = ["<|im_start|>", "<|im_end|>", "\u0120", "\u010a"] + letters
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(1)
    kv = KV_HEADS * WIDTH // HEADS
    tensors = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,), "output": (VOCABULARY, WIDTH)}
    for i in range(2):
        tensors |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH),
            "attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,),
            "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}.items()}
    for name, shape in (tensors | (shapes or {})).items():
        if name not in skip:
            values = rng.normal(size=shape).astype(numpy.float32) / numpy.sqrt(shape[-1])
            writer.add_tensor(name + ".weight", (values + (len(shape) == 1)).astype(numpy.float32))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("small") / "small.gguf")


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize("arguments,part", [
    ([], "no model: give --model FILE or --random SHAPE (one of tiny, "),
    (["--modle", "x"], "--modle: no such option"),
    (["--random", "tiny"], "no prompt: give --prompt"),
    (["--random", "tiny", "--prompt", "x"], "--random: has no tokenizer"),
    (["--random", "tiny", "--model", "x"], "give one of them"),
    (["--random", "tiny", "--ids", "1", "--chunk", "0"], "--chunk 0: is not a whole number from 1 to"),
    (["--random", "tiny", "--ids", "1", "--chunk", "4k"], "--chunk 4k: is not a whole number"),
    (["--random", "tiny", "--ids", "1", "--temp", "hot"], "--temp hot: is not a number from 0"),
    (["--random", "tiny", "--ids", "1", "--seed", "-1"], "--seed -1: is not a whole number"),
    (["--random", "tiny", "--ids", "1", "--kv-dtype", "f8"], "--kv-dtype f8: is none of f16|bf16|f32"),
    (["--random", "tiny", "--ids", "1", "--mode", "dyn"], "--mode dyn: is none of dynamic|"),
    (["--random", "tiny", "--ids"], "--ids: lacks its value (LIST)"),
    (["--local=yes"], "--local: takes no value"),
    (["--random", "tiny", "--ids", "1", "--system", "x"], "--system: needs --chat"),
    (["--random", "huge", "--ids", "1"], "--random huge: no such shape; there are tiny"),
    (["--random", "tiny", "--ids", "1,x"], '--ids: "x" does not begin with a token id'),
    (["--random", "tiny", "--ids", "1,,2"], '--ids: ",2" does not begin with a token id'),
    (["--random", "tiny", "--ids", "1", "--ids", ""], '--ids: "" does not begin with a token id'),
    (["--random", "tiny", "--ids", "99999999999"], 'does not begin with a token id'),
    (["--random", "tiny", "--ids", "1", "--piece-tokens", "100"], "--piece-tokens 100: is not a multiple of 256"),
    (["--random", "tiny", "--ids", "1", "--steps-ahead", "65"], "--steps-ahead 65: is not a whole number from 1 to 64"),
    (["--random", "tiny", "--ids", "1", "--name", "x" * 64], "has 64 bytes; at most 63 are possible"),
    (["--random", "tiny", "--ids", "1", "--rows", "2000"], "--rows 2000: is not a whole number from 1 to 1024"),
    (["--random", "tiny", "--ids", "1", "--ids", "2", "--rows", "513"],
     "--rows 513: of 2 prompts are 1026 rows; at most 1024 are possible"),
])
@pytest.mark.parametrize("where", [[], ["--local"]], ids=" ".join)
def test_wrong_usage(where, arguments, part):
    """The same text whoever keeps K and V, before a daemon is looked for."""
    out, err = run(*where, *arguments, status=2)
    assert out == "" and err.startswith("kvtier-run: ") and part in err


@pytest.mark.parametrize("arguments,part", [
    (["--random", "tiny", "--ids", "1, 512"], '--ids: 512 is no token of this model, whose ids are below 512'),
    (["--random", "tiny", "--ids", "1", "--context", "4", "-n", "10"], "do not fit in a context of 4"),
    (["--random", "tiny", "--ids", "1", "--dump-logits", "/nowhere/x"], "--dump-logits /nowhere/x: cannot"),
    (["--model", "missing.gguf", "--ids", "1"], "missing.gguf: cannot open the model: No such file"),
    (["--model", "/dev/null", "--ids", "1"], "/dev/null: is not a regular file"),
    (["--model", __file__, "--ids", "1"], "is not a GGUF file"),
])
def test_wrong_values(arguments, part):
    out, err = run(*arguments, "--local", status=1)
    assert out == "" and err.startswith("kvtier-run: ") and part in err


@pytest.mark.parametrize("change,part", [
    ({"architecture": "gpt2"}, 'architecture "gpt2" is not supported; supported is "llama"'),
    ({"extra": {"add_expert_count": 8}}, "mixture of 8 experts"),
    ({"extra": {"add_rope_scaling_type": gguf.RopeScalingType.YARN}}, 'RoPE scaling "yarn" is not supported'),
    ({"extra": {"add_head_count_kv": 3}}, "its heads do not fit together"),
    ({"extra": {"add_block_count": 1000000}}, "lacks tensor blk.999999.attn_norm.weight"),
    ({"extra": {"add_block_count": 0}}, "llama.block_count is not a number from 1"),
    ({"skip": ["blk.1.ffn_up"]}, "lacks tensor blk.1.ffn_up.weight"),
    ({"skip": ["token_embd"]}, "no usable tensor token_embd.weight"),
    ({"shapes": {"blk.0.attn_k": (16, WIDTH)}}, "tensor blk.0.attn_k.weight is 64 x 16, but"),
    ({"tokenizer": False}, "carries no tokenizer"),
])
def test_unusable_model(tmp_path, change, part):
    extra = change.get("extra", {})
    if "add_head_count_kv" in extra or "add_block_count" in extra:
        path = patch_count(write_model(tmp_path / "m.gguf"), extra)
    else:
        path = write_model(tmp_path / "m.gguf", **change)
    _, err = run("--model", path, "--prompt", "x", "--local", status=1)
    assert str(path) in err and part in err


def patch_count(path, extra):
    """The writer refuses a key twice, so the number is changed in the file."""
    key, value = {"add_head_count_kv": "llama.attention.head_count_kv",
                  "add_block_count": "llama.block_count"}[next(iter(extra))], next(iter(extra.values()))
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    data[at:at + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def test_layers_and_context_of_a_model(small):
    _, err = run("--model", small, "--ids", "1", "--layers", 3, "--local", status=1)
    assert f"{small}: has 2 layers; --layers 3 is more" in err
    said = "--context 1025 is more than the 1024 tokens that this model was made for"
    for context, warns in ((1024, False), (1025, True)):
        _, err = run("--model", small, "--ids", "1", "-n", 2, "--context", context, "--local")
        assert (said in err) == warns and bool(err) == warns
    assert run(*TINY, "--ids", "1", "-n", 2, "--layers", 9, "--context", 10 ** 8)[1] == ""


def test_truncated_model(small, tmp_path):
    data = small.read_bytes()
    for size in (3, 20, 300, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        _, err = run("--model", tmp_path / "cut.gguf", "--prompt", "x", "--local", status=1)
        assert "truncated" in err and "fetch it again" in err


def test_unsupported_tensor_type(small, tmp_path):
    data = bytearray(small.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16
    data[at:at + 4] = (11).to_bytes(4, "little")
    (tmp_path / "q3.gguf").write_bytes(data)
    _, err = run("--model", tmp_path / "q3.gguf", "--prompt", "x", "--local", status=1)
    assert "tensor blk.0.ffn_up.weight has type Q3_K (11), which is not supported; use" in err


def test_chat_needs_a_template(small):
    _, err = run("--model", small, "--prompt", "x", "--chat", "--local", status=1)
    assert "carries no chat template; leave out --chat" in err


def test_help_names_every_option():
    out, _ = run("--help")
    for word in ("--model", "--prompt-file", "--steps-ahead", "--piece-tokens", "(default f16)",
                 "llama-3-8b", "Exit status"):
        assert word in out
    assert run("--version")[0].startswith("kvtier-run 0.")


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--rows", "2"], ["-n", "2000"]], ids=" ".join)
def test_full_disk(arguments):
    """What cannot be written is no success, and nothing more is generated for it."""
    with open("/dev/full", "wb") as full:
        for shown in ([*TINY, "--ids", "1", "-n", "4", *arguments], ["--help"], ["--version"]):
            done = subprocess.run([BIN, *shown], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
            assert done.returncode == 1
            assert done.stderr == b"kvtier-run: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("count", [1, 50])  # it shows when the file is closed, or before
def test_full_disk_of_logits(count):
    _, err = run(*TINY, "--ids", "1", "-n", count, "--dump-logits", "/dev/full", status=1)
    assert err == "kvtier-run: --dump-logits /dev/full: cannot be written: No space left on device\n"


# ---------------------------------------------------------------- the same bits


def logits_of(tmp_path, *arguments):
    path = tmp_path / "logits"
    out, _ = run(*arguments, "--json", "--dump-logits", path)
    return json.loads(out), path.read_bytes()


def test_cut_threads_and_steps_leave_bits_alone(tmp_path):
    base = [*TINY, "--prompt-tokens", 1500, "-n", 40, "--chunk", 200]
    first, bits = logits_of(tmp_path, *base, "--threads", 1, "--steps-ahead", 1)
    assert len(bits) == 512 * 4 * (8 + 39) and first["rows"][0]["ids"]
    for more in (["--piece-tokens", 256], ["--piece-tokens", 512, "--threads", 3],
                 ["--piece-tokens", 1024, "--threads", 2, "--steps-ahead", 16], ["--threads", 4]):
        again, other = logits_of(tmp_path, *base, *more)
        assert other == bits, more
        assert again["rows"] == first["rows"]


def test_real_model_same_bits_for_every_cut(tmp_path):
    if not os.path.exists(MODEL):
        pytest.skip("no model; run `make model`")
    base = ["--model", MODEL, "--local", "--prompt", "one two three four five " * 130, "-n", 8]
    first, bits = logits_of(tmp_path, *base)
    assert first["prompt_tokens"] > 2 * 256
    assert logits_of(tmp_path, *base, "--piece-tokens", 256, "--threads", 1)[1] == bits


def test_rows_of_one_prompt(tmp_path):
    """Greedy rows are equal; sampled ones differ from each other and repeat with their seed."""
    base = [*TINY, "--prompt-tokens", 300, "-n", 12, "--json"]
    greedy = json.loads(run(*base, "--rows", 3)[0])["rows"]
    assert len(greedy) == 3 and greedy[0] == greedy[1] == greedy[2]
    sampled = [json.loads(run(*base, "--rows", 3, "--temp", 1, "--seed", seed)[0])["rows"]
               for seed in (5, 5, 6)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0][0] != sampled[0][1]


def test_prompts_of_different_lengths_side_by_side():
    """Each row of a batch gets what it gets alone: the shapes differ, so up to rounding."""
    lists = [",".join(str((7 * i + k) % 512) for i in range(n)) for k, n in ((1, 3), (2, 700), (3, 256))]
    together = json.loads(run(*TINY, *[a for ids in lists for a in ("--ids", ids)], "-n", 6, "--json")[0])
    for ids, row in zip(lists, together["rows"]):
        assert json.loads(run(*TINY, "--ids", ids, "-n", 6, "--json")[0])["rows"][0] == row


def test_prompt_file_and_text_agree(small, tmp_path):
    (tmp_path / "p.txt").write_text("Hello there")
    by_text = run("--model", small, "--prompt", "Hello there", "-n", 8, "--local")
    assert by_text == run("--model", small, "--prompt-file", tmp_path / "p.txt", "-n", 8, "--local")


def test_layers_and_rope_factors_matter(tmp_path):
    path = write_model(tmp_path / "m.gguf", rope_factors=numpy.full(8, 4, dtype=numpy.float32))
    plain = write_model(tmp_path / "plain.gguf")
    base = ["--prompt", "abc def ghi", "-n", 1, "--local"]
    one = logits_of(tmp_path, "--model", plain, *base)[1]
    assert one != logits_of(tmp_path, "--model", path, *base)[1]
    assert one != logits_of(tmp_path, "--model", plain, *base, "--layers", 1)[1]


# ---------------------------------------------------------------- as people use it


def test_chat_with_the_real_model():
    if not os.path.exists(MODEL):
        pytest.skip("no model; run `make model`")
    out, err = run("--model", MODEL, "--chat", "--prompt", "What is the capital of France?", "-n", 30,
                   "--local", "--progress", "always")
    assert "Paris" in out
    assert "prompt   [" in err and "tokens/s" in err


def caught_by(process, number):
    with open(f"/proc/{process.pid}/status", encoding="ascii", errors="replace") as stream:
        return int(re.search(r"SigCgt:\s*(\w+)", stream.read()).group(1), 16) >> (number - 1) & 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_waiting_for_a_daemon(number, tmp_path):
    child = subprocess.Popen([BIN, "--random", "tiny", "--ids", "1", "--runtime-dir", tmp_path],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not caught_by(child, number):
        time.sleep(0.01)
    start = time.monotonic()
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 130 and out == b"" and err == b"\nkvtier-run: interrupted\n"
    assert time.monotonic() - start < 3  # it waits 5 seconds for a daemon


def test_interrupt_ends_in_order():
    child = subprocess.Popen([BIN, *TINY, "--prompt-tokens", "10", "-n", "100000", "--json"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 130 and b"interrupted" in err
    assert len(json.loads(out)["rows"][0]["ids"]) > 0
