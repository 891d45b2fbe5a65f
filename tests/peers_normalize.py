"""Public normalizers on the sample rows of tests/data/normalize_hi: what each merges, and what it destroys.

    python tests/peers_normalize.py
    python tests/peers_normalize.py PAIRS.tsv       # also the WER of your own (sentence, transcript) pairs under each

merged    of the spellings that are one word, how many become equal          (more is fairer)
kept      of the pairs that are two words, how many stay different           (all, or WER lies)
numbers   of the written numbers, how many meet a spoken form
errors    of the sentence pairs, in how many jiwer counts the fair number of word errors
raised    rows on which the normalizer raised an exception (they count as failed)

Whitespace is made single before comparing, so nobody loses for a double space. The peers are not in
requirements.txt; what is not installed is skipped and named. For the full table, in an environment of its own:
    pip install openai-whisper jiwer whisper-normalizer indic-nlp-library
"""
import re
import string
import sys
import unicodedata
from importlib import metadata
from pathlib import Path

import jiwer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import normalize_hi  # noqa: E402

DATA = Path(__file__).parent / "data" / "normalize_hi"


def rows(name):
    for line in (DATA / name).read_text(encoding="utf-8").splitlines()[1:]:
        yield [re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), cell) for cell in line.split("\t")]


def plain():
    yield "no normalization", "unicodedata", lambda text: text
    yield "NFC", "unicodedata", lambda text: unicodedata.normalize("NFC", text)
    yield "NFKC", "unicodedata", lambda text: unicodedata.normalize("NFKC", text)


def whisper():
    from whisper.normalizers import BasicTextNormalizer
    yield "whisper Basic", "openai-whisper", BasicTextNormalizer()
    yield "whisper Basic, remove_diacritics", "openai-whisper", BasicTextNormalizer(remove_diacritics=True)


def whisper_normalizer():
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.indic import HindiNormalizer
    yield "whisper-normalizer Basic", "whisper-normalizer", BasicTextNormalizer()
    yield "whisper-normalizer Hindi", "whisper-normalizer", HindiNormalizer()
    yield "whisper-normalizer Hindi, all on", "whisper-normalizer", HindiNormalizer(
        remove_nuktas=True, nasals_mode="to_anusvaara_relaxed", do_normalize_chandras=True,
        do_normalize_vowel_ending=True)


def indic_nlp_library():
    from indicnlp.normalize.indic_normalize import IndicNormalizerFactory
    def normalizer(**options):
        return IndicNormalizerFactory().get_normalizer("hi", **options).normalize
    usual, package = normalizer(), "indic-nlp-library"
    yield "indic-nlp-library", package, usual
    yield "indic-nlp-library, all on", package, normalizer(
        remove_nuktas=True, nasals_mode="to_anusvaara_relaxed", do_normalize_chandras=True,
        do_normalize_vowel_ending=True)
    # evaluation.py of AI4Bharat/vistaar deletes punctuation, then normalizes
    gone = str.maketrans("", "", string.punctuation + "।۔'-॥")
    yield "indic-nlp-library, Vistaar's recipe", package, lambda text: usual(text.translate(gone))


def this():
    yield "normalize_hi.py", "this file", normalize_hi.normalize


def score(normalizer):
    """The five columns, as strings."""
    raised = [0]

    def safe(text):
        try:
            return " ".join(normalizer(text).split())
        except (LookupError, TypeError, ValueError):      # a peer's failure is a result: counted and printed
            raised[0] += 1
            return None

    def count(name, good):
        table = list(rows(name))
        return f"{sum(good(row) for row in table)}/{len(table)}"

    def merged(row):
        a, b = safe(row[0]), safe(row[1])
        return a == b and a is not None

    def kept(row):
        a, b = safe(row[0]), safe(row[1])
        return a != b and None not in (a, b)

    def read(row):
        written = safe(row[0])
        return written is not None and written in map(safe, row[1].split("|"))

    def fair(row):
        a, b = safe(row[0]), safe(row[1])
        if None in (a, b):
            return False
        found = jiwer.process_words(a, b)
        return found.substitutions + found.deletions + found.insertions == int(row[2])

    return [count("variants.tsv", merged), count("minimal_pairs.tsv", kept), count("numbers.tsv", read),
            count("sentences.tsv", fair), str(raised[0])]


def wer(normalizer, pairs):
    """Corpus WER in percent; a pair that raises counts as it is."""
    def safe(text):
        try:
            return " ".join(normalizer(text).split())
        except (LookupError, TypeError, ValueError):
            return text
    return 100 * jiwer.wer(*([safe(row[k]) for row in pairs] for k in (0, 1)))


def main():
    pairs = [line.split("\t")
             for line in Path(sys.argv[1]).read_text(encoding="utf8").splitlines()] if sys.argv[1:] else []
    print(f"{'':37s} {'version':>10s} {'merged':>7s} {'kept':>6s} {'numbers':>7s} {'errors':>6s} {'raised':>6s}"
          + "    WER" * bool(pairs))
    skipped = []
    for family in (plain, whisper, whisper_normalizer, indic_nlp_library, this):
        try:
            for name, package, normalizer in family():
                version = {"unicodedata": unicodedata.unidata_version, "this file": "-"}.get(package)
                merged, kept, numbers, errors, raised = score(normalizer)
                print(f"{name:37s} {version or metadata.version(package):>10s} {merged:>7s} {kept:>6s} {numbers:>7s} "
                      f"{errors:>6s} {raised:>6s}" + (f" {wer(normalizer, pairs):6.1f}" if pairs else ""), flush=True)
        except ImportError as missing:
            skipped.append(f"skipped {family.__name__}: {missing}; see the top of this file")
    print(*skipped, sep="\n")


if __name__ == "__main__":
    main()
