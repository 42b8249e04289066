"""Our tokenizer against known ids, and against the `tokenizers` package where it is installed.

KNOWN was written by that package (0.23.3) from the vocabulary in the model's file and the rules of
SmolLM2's own tokenizer.json (digits alone, then byte level) or of Llama 3's.
"""
import json
import os
import random
import struct
import subprocess

import gguf
import pytest

TOOL = os.path.join(os.environ.get("KVT_BUILD", "build/release"), "tests/unit/tokenizer_tool")
MODEL = os.environ.get("KVT_MODEL", "build/model/SmolLM2-135M-Instruct.Q4_1.gguf")
KNOWN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizer_known.json")
PRES = ["smollm", "gpt-2", "llama-bpe"]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = [
    "", " ", "  ", "\n", "a", "Hello, world!", "Hello  world   again", "it's I'll we've THEY'RE 'tis",
    "In 2024, 12345 people; 3.14159 and 1/2 and 2²", "tabs\tand\r\nline ends\n\n\n  indented",
    "trailing spaces   ", "   leading", "déjà vu Ñandú Übergröße", "日本語のテキスト。改行\nあり",
    "עברית עם רווחים", "emoji 👩‍👩‍👧‍👦 and 🇫🇷 flags", "x" * 300, " " * 77 + "y", "!!!???---===",
    "for (int i = 0; i < n; i++) { sum += a[i]; }\n\treturn sum;", "ⅷ ½ ٣٤٥ 一二三", "\u00a0nbsp\u2003em",
    "a'b don't can'T", "<|im_start|>user\nhi<|im_end|>", "mixed123abc456", "...\n\n...", "\u200bzero",
]


def ids_of(texts, model, *flags, round_trip=False):
    data = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)
    done = subprocess.run([TOOL, model, *flags], input=data, stdout=subprocess.PIPE, timeout=60,
                          check=True)
    lines = done.stdout.decode().split("\n")[:-1]
    for text, line in zip(texts, lines):
        assert not round_trip or "!" not in line, f"{text!r} does not come back"
    return [[int(word) for word in line.rstrip(" !").split()] for line in lines]


@pytest.fixture(scope="module")
def fields():
    if not os.path.exists(MODEL):
        pytest.skip("no model; run `make model`")
    reader = gguf.GGUFReader(MODEL)
    return {name: reader.fields["tokenizer.ggml." + name].contents()
            for name in ("tokens", "token_type", "merges")}


@pytest.fixture(scope="module")
def model_of(fields, tmp_path_factory):
    """A file with the model's vocabulary and nothing else, that names another way to cut words."""
    made = {}

    def make(pre):
        if pre not in made:
            path = str(tmp_path_factory.mktemp("tokenizer") / f"{pre}.gguf")
            writer = gguf.GGUFWriter(path, "llama")
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(pre)
            writer.add_token_list(fields["tokens"])
            writer.add_token_types(fields["token_type"])
            writer.add_token_merges(fields["merges"])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            made[pre] = path
        return made[pre]

    return make


def reference_of(fields, pre):
    tokenizers = pytest.importorskip("tokenizers", reason="no tokenizers; run `make venv-torch`")
    vocabulary = {token: i for i, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    bpe = tokenizers.models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
    reference = tokenizers.Tokenizer(bpe)
    cut = tokenizers.pre_tokenizers
    reference.pre_tokenizer = {
        "gpt-2": lambda: cut.ByteLevel(add_prefix_space=False),
        "smollm": lambda: cut.Sequence([cut.Digits(individual_digits=True),
                                        cut.ByteLevel(add_prefix_space=False)]),
        "llama-bpe": lambda: cut.Sequence([
            cut.Split(tokenizers.Regex(LLAMA3), behavior="isolated"),
            cut.ByteLevel(add_prefix_space=False, use_regex=False)]),
    }[pre]()
    return lambda text: reference.encode(text, add_special_tokens=False).ids


def random_texts(count):
    rng = random.Random(7)
    alphabets = ["abc ", "aB'sStTlL m", "0129 a\n", " \t\n\r\u00a0", "é日🙂 a1.", ".,;!? \n-a",
                 "".join(chr(c) for c in range(32, 127))]
    for _ in range(count):
        letters = rng.choice(alphabets)
        yield "".join(rng.choice(letters) for _ in range(rng.randrange(1, 60)))
    for _ in range(count // 4):
        yield "".join(chr(rng.choice([rng.randrange(32, 0x3000), rng.randrange(0xE000, 0x1FFFF)]))
                      for _ in range(rng.randrange(1, 40)))


@pytest.mark.parametrize("pre", PRES)
def test_known_ids(model_of, pre):
    with open(KNOWN, encoding="utf-8") as stream:
        known = json.load(stream)[pre]
    assert [text for text, _ in known] == TEXTS
    for (text, wanted), ours in zip(known, ids_of(TEXTS, model_of(pre), round_trip=True)):
        assert ours == wanted, repr(text)


@pytest.mark.parametrize("pre", PRES)
def test_equals_tokenizers_package(fields, model_of, pre):
    reference = reference_of(fields, pre)
    texts = TEXTS + list(random_texts(2000))
    for text, ours in zip(texts, ids_of(texts, model_of(pre))):
        assert ours == reference(text), repr(text)


def test_control_tokens_only_when_asked(model_of):
    text = "<|im_start|>user\nhi<|im_end|>"
    plain, special = (ids_of([text], model_of("smollm"), *flags)[0] for flags in ((), ("special",)))
    assert 1 not in plain and 2 not in plain
    assert special[0] == 1 and special[-1] == 2 and 1 not in special[1:-1]


SENTENCEPIECE = [  # piece, score, type: 2 unknown, 3 control, 6 byte
    ("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("<0xC3>", 0, 6), ("<0xA9>", 0, 6),
    ("<0x21>", 0, 6), ("\u2581", -20, 1), ("a", -21, 1), ("b", -22, 1), ("c", -23, 1),
    ("ab", -1, 1), ("bc", -2, 1), ("\u2581a", -3, 1), ("\u2581ab", -4, 1), ("abc", -5, 1),
]


@pytest.mark.parametrize("text,wanted", [
    ("ab ab", [13, 13]),        # "ab" has the best score, then the space joins it
    ("abc", [13, 9]),           # "\u2581ab" (-4) goes before "abc" (-5)
    ("a bc", [12, 6, 11]),
    ("é!", [6, 3, 4, 5]),       # bytes, where no piece fits
    ("cab", [6, 9, 10]),
])
def test_sentencepiece(tmp_path, text, wanted):
    path = str(tmp_path / "pieces.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in SENTENCEPIECE])
    writer.add_token_scores([float(score) for _, score, _ in SENTENCEPIECE])
    writer.add_token_types([kind for _, _, kind in SENTENCEPIECE])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert ids_of([text], path)[0] == wanted


@pytest.mark.parametrize("kind,pre,part", [
    ("gpt2", "klingon", 'cuts words by the rules of "klingon"; supported are'),
    ("t5", "default", 'its tokenizer is of kind "t5"; supported are'),
])
def test_unsupported_is_named(tmp_path, kind, pre, part):
    writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    done = subprocess.run([TOOL, str(tmp_path / "odd.gguf")], capture_output=True, check=False,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 3 and part in done.stderr.decode()


def write_known():
    """KVT_WRITE_KNOWN=1 python tests/python/test_tokenizer.py, with `tokenizers` installed."""
    reader = gguf.GGUFReader(MODEL)
    parts = {name: reader.fields["tokenizer.ggml." + name].contents() for name in ("tokens", "merges")}
    known = {pre: [[text, reference_of(parts, pre)(text)] for text in TEXTS] for pre in PRES}
    with open(KNOWN, "w", encoding="utf-8") as stream:
        stream.write("{\n" + ",\n".join(
            json.dumps(pre) + ": [\n" + ",\n".join(json.dumps(case) for case in cases) + "]"
            for pre, cases in known.items()) + "}\n")


if __name__ == "__main__" and os.environ.get("KVT_WRITE_KNOWN"):
    write_known()
