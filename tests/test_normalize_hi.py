"""What normalize_hi promises: free spellings meet, words stay apart, and no string can break it."""
import ast
import doctest
import random
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import jiwer
import pytest

import normalize_hi
from normalize_hi import cardinal, normalize

DATA = Path(__file__).parent / "data" / "normalize_hi"
FLAGS = ["numbers", "nukta", "lexical", "virama", "nasal", "doubled", "chandrabindu", "glide", "join"]


def rows(name):
    """The cells of a .tsv file below its header; \\uXXXX in a cell is that character."""
    for line in (DATA / name).read_text(encoding="utf-8").splitlines()[1:]:
        yield [re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), cell) for cell in line.split("\t")]


def broken_promises(text, **flags):
    """The names of the promises that normalize(text, **flags) does not keep."""
    once = normalize(text, **flags)
    return [name for name, kept in {
        "idempotent": normalize(once, **flags) == once,
        "single-spaced": once == " ".join(once.split()),
        "NFC is NFD": normalize(unicodedata.normalize("NFC", text), **flags)
        == normalize(unicodedata.normalize("NFD", text), **flags),
        "as typed is NFC": normalize(unicodedata.normalize("NFC", text), **flags) == once,
        "no digits": not flags.get("numbers", True) or not any(c.isdecimal() for c in once),
        "no punctuation": not any(unicodedata.category(c)[0] in "PSZ" and c != " " for c in once),
        "can be written": once.encode("utf-8") is not None,
    }.items() if not kept]


# ---------------------------------------------------------------------------------------- by hand

def test_docstrings():
    """Every before/after pair in the file, the usage example included, is executed."""
    failed, attempted = doctest.testmod(normalize_hi)
    assert failed == 0 and attempted >= 18


def test_whisper_loses_vowels():
    """The opening claim: BasicTextNormalizer turns हिन्दी में into ह न द म, and में, मैं, माँ into one word."""
    from whisper.normalizers import BasicTextNormalizer
    basic = BasicTextNormalizer()
    assert basic("हिन्दी में").split() == ["ह", "न", "द", "म"]
    assert len({basic(word).strip() for word in ("में", "मैं", "माँ")}) == 1
    assert len({normalize(word) for word in ("में", "मैं", "माँ")}) == 3


def test_variants_merge():
    """Two spellings of one word become equal."""
    assert [row for row in rows("variants.tsv") if normalize(row[0]) != normalize(row[1])] == []


def test_minimal_pairs_stay_apart():
    """Two words stay two words."""
    assert [row for row in rows("minimal_pairs.tsv") if normalize(row[0]) == normalize(row[1])] == []


def test_own_rows():
    """Rows for every step: what must merge, and what looks like it and must not."""
    wrong = [row for row in rows("own_rows.tsv") if (normalize(row[0]) == normalize(row[1])) != (row[2] == "same")]
    assert wrong == []
    steps = {row[3] for row in rows("own_rows.tsv")}
    assert {"one_encoding", "typed_signs", "akshara_order", "one_vowel", "acronyms", "punctuation", "join_words",
            "number_words"} | {step.__name__ for step in normalize_hi.SPELLING} <= steps


def test_numbers_are_read():
    """A written number meets one of the ways in which it is spoken."""
    assert [row for row in rows("numbers.tsv")
            if normalize(row[0]) not in map(normalize, row[1].split("|"))] == []


def test_number_words():
    """0 to 99: the digits and every other spelling of the word meet the word; no two numbers meet."""
    table = list(rows("number_words.tsv"))
    for n, word, others in table:
        assert {normalize(form) for form in [n, *filter(None, others.split("|"))]} == {normalize(word)}
    assert len({normalize(word) for _, word, _ in table}) == 100


def test_each_flag():
    """A flag that is off keeps apart what its step merges, and nothing else changes."""
    pairs = {"numbers": ("5", "पाँच"), "nukta": ("राज़", "राज"), "lexical": ("चिन्ह", "चिह्न"),
             "virama": ("जगत्", "जगत"), "nasal": ("हिन्दी", "हिंदी"), "doubled": ("अर्द्ध", "अर्ध"),
             "chandrabindu": ("माँ", "मां"), "glide": ("गयी", "गई"), "join": ("उस ने", "उसने")}
    assert list(pairs) == FLAGS
    for flag, (a, b) in pairs.items():
        assert normalize(a) == normalize(b)
        for off in FLAGS:
            same = normalize(a, **{off: False}) == normalize(b, **{off: False})
            assert same == (off != flag), (flag, off)


def test_sounds_never_touched():
    """With every flag on: ड़ and ढ़ keep their dot, and no vowel sign or virama inside a word goes."""
    assert normalize("पढ़े-लिखे लड़के ने सत्य कहा") == "पढ़े लिखे लड़के ने सत्य कहा"
    for words in ("क्षत्रिय विद्यार्थी स्वास्थ्य", "जन्म अन्य सम्मान तुम्हें धन्वा उन्हें कन्या",
                  "पक्का पत्ता अच्छा सत्ता बुद्ध", "डॉक्टर कॉलेज बॉल", "बॉंड मॉंटेसरी", "वाङ्मय", "मूल्ये ये",
                  "বাংলা தமிழ் ગુજરાતી"):
        assert normalize(words) == words


@pytest.mark.parametrize("bad", [None, b"text", 5, ["text"]])
def test_not_a_str(bad):
    """Bytes, lists and None are named in the TypeError."""
    with pytest.raises(TypeError, match=f"normalize takes a str, got {type(bad).__name__}"):
        normalize(bad)


# ------------------------------------------------------------------------------------- invariants

def test_every_code_point():
    """Each assigned code point alone, and in a word, before a vowel sign and after a digit: of ideographs and
    syllables every sixteenth. Then all there are, between spaces."""
    chars = [chr(code) for code in range(0x110000)]
    assigned = [char for char in chars if unicodedata.category(char) not in ("Cn", "Co", "Cs")
                and (unicodedata.category(char) != "Lo" or char < "\u3400" or ord(char) % 16 == 0)]
    for char in assigned:
        once = normalize(char)
        assert once == char or normalize(once) == once, ascii(char)
    for chunk in [assigned[i:i + 100] for i in range(0, len(assigned), 100)]:
        assert broken_promises(" ".join(f"क{char}ि a{char}5" for char in chunk)) == [], ascii(chunk)
    for chunk in [chars[i:i + 2000] for i in range(0, len(chars), 2000)]:
        once = normalize(" ".join(chunk))
        assert normalize(once) == once and not re.search(r"\d", once), ascii(chunk[0])


def test_invisible_characters_go():
    """Every character of category Cf, and the variation selectors, leave the word as it was."""
    for code in [*range(0xfe00, 0xfe10), 0xe0100, *range(0x110000)]:
        if unicodedata.category(chr(code)) == "Cf" or code in (0xfe00, 0xfe0f, 0xe0100):
            assert normalize(f"क{chr(code)}ल") == "कल", hex(code)


def test_every_script_counts():
    """The digits of every script are the same ten digits."""
    for code in range(0x110000):
        if chr(code).isdecimal():
            assert normalize(chr(code)) == normalize(str(unicodedata.decimal(chr(code)))), hex(code)


PIECES = """न् म् ङ् ण् ञ् र् त् त्त् व श स ह क द य दुःख चिन्ह ये यी यें येगा हँस अँगना उस ने को कि क्यों रु rs बजे
    वां वी ला सौ उन्नीस लाख छ: श्रृ र्इ ङ ॉ ं अ आ ा े ै ॅ ँ ः ् ़ एवम् कौवा ई याँ बी. एच. a. U.S. ' ’ 5 ५ 10:30
    1/2 1,000 .5 ° % ₹ $ /- - − + – ^ km /h m² 98765 011 05 2008 only माइनस ऋण रुपये ₩ मि. ली मी : . । ॰ ० ½ ²
    ℃ ™ ॐ ऽ \u0301 \u0338 \u0951 \u200d \u200b é Σ İ \ud800""".split() + [" "]


@pytest.mark.parametrize("draw, count", [
    (lambda rng: chr(rng.randrange(0x110000)), 4000),
    (lambda rng: chr(rng.randrange(0x900, 0x980)), 8000),
    (lambda rng: rng.choice(PIECES), 10000)], ids=["unicode", "devanagari", "pieces"])
def test_promises_hold_for_random_text(draw, count):
    """Idempotent, blind to NFC/NFD, single-spaced, free of digits and punctuation, under random flags."""
    rng = random.Random(0)
    for _ in range(count):
        text = "".join(draw(rng) for _ in range(rng.randrange(1, 12)))
        flags = {flag: rng.random() < 0.5 for flag in FLAGS} if rng.random() < 0.4 else {}
        assert broken_promises(text, **flags) == [], (ascii(text), flags)


def test_no_word_is_split_or_lost():
    """One word in, one word out: every Devanagari word of the rows, on its own."""
    tables = "variants.tsv", "minimal_pairs.tsv", "sentences.tsv", "number_words.tsv"
    words = {word for table in tables for row in rows(table) for cell in row[:2]
             for word in re.findall("[\u0904-\u0939\u0958-\u0961][\u0900-\u0963]*", cell)}
    assert len(words) > 250
    assert [word for word in words if len(normalize(word).split()) != 1] == []


@pytest.mark.parametrize("unit", [
    "क", "क्", "कं", "\u0301", "\u0338\u093c", "\u0f73", "ि\u0902्", "1", "1,", "1.", "क.", "a.", "बी.", "र्", "त्",
    "र्त्", "अ\u093e", "\u0945", "₹5 सौ ", "5 सौ ", "5-", "क:", "उस ने ", "हँस ", "\ud800", "x'", "-5", " -5", "+",
    "(1 ", "98765 ", "₹-", ".5", "m^", "कि. ", "km/", "माइनस ", "उन्नीस सौ ", "5 km ", "9.30-"])
def test_linear_time(unit):
    """Eight times the text takes about eight times as long (quadratic would be 64), wherever a match fails."""
    def seconds(n):
        texts = [unit * (n // len(unit)) + end for end in ("", "x", "व", "इ", ":5")]
        start = time.process_time()
        for text in texts:
            normalize(text)
        return time.process_time() - start
    short = min(seconds(2_500) for _ in range(3))
    assert seconds(20_000) < 25 * short + 0.05


def test_a_megabyte_without_a_space():
    """One word of a million characters, and 10,000 combining marks in a row, come back in seconds."""
    start = time.process_time()
    assert normalize("का" * 500_000) == "का" * 500_000
    assert broken_promises("क" + "\u093c\u0338\u0902" * 3_334) == []
    assert time.process_time() - start < 20


# ------------------------------------------------------------------------- oracles written by others

def test_error_counts_with_jiwer():
    """Between a normalized reference and hypothesis, jiwer counts the errors that a listener would."""
    wrong = []
    for reference, hypothesis, errors, *_ in rows("sentences.tsv"):
        found = jiwer.process_words(normalize(reference), normalize(hypothesis))
        if found.substitutions + found.deletions + found.insertions != int(errors):
            wrong.append((reference, hypothesis, errors))
    assert wrong == []


def test_cardinal_read_back():
    """The words of 20,000 numbers below 10**19, added up again: a unit adds, सौ multiplies, लाख closes a group."""
    value = {word: int(n) for n, word, _ in rows("number_words.tsv")}
    closes = {"हज़ार": 10**3, "लाख": 10**5, "करोड़": 10**7, "अरब": 10**9, "खरब": 10**11, "नील": 10**13,
              "पद्म": 10**15, "शंख": 10**17}
    rng = random.Random(0)
    for n in [*range(2000), *(rng.randrange(10 ** rng.randrange(1, 20)) for _ in range(18_000)), 10**19 - 1]:
        total = group = 0
        for word in cardinal(n).split():
            if word in closes:
                total, group = total + group * closes[word], 0
            else:
                group = group * 100 if word == "सौ" else group + value[word]
        assert total + group == n


def test_copied_alone(tmp_path):
    """Copied into an empty folder the file works; it imports the standard library only, and is in NFC."""
    source = Path(normalize_hi.__file__)
    text = source.read_text(encoding="utf-8")
    assert unicodedata.is_normalized("NFC", text)
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= {"re", "unicodedata", "functools", "itertools"}
    shutil.copy(source, tmp_path)
    command = ("import sys; sys.path.insert(0, sys.argv[1]); from normalize_hi import normalize; "
               "assert normalize('5') == normalize('पाँच')")
    subprocess.run([sys.executable, "-I", "-c", command, str(tmp_path)], check=True)
