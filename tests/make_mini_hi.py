"""Make tests/data/mini_hi: everyday Hindi sentences spoken by espeak-ng, in Common Voice's folder layout.

    python tests/make_mini_hi.py                                    # needs espeak-ng (apt); about 2 minutes
    python tests/make_mini_hi.py --voice en --out runs/mini_en      # English by the same rules; not shipped

    train.tsv  1,400 clips   11 voices x 2 settings of pitch and speed
    dev.tsv      240 clips   80 by the same voices, 160 by two heard nowhere else
    test.tsv     240 clips   half by the same voices, half by two others heard nowhere else

A template grammar gives sentences of 3-7 words from about 160 word forms. Every sentence is drawn once, so none of dev
or test stands in train. It is then written the way people write: numbers as words or as digits, words with two
accepted spellings in either, with danda, question mark and commas. What was said does not settle how it is written, so
the word error rate means something only after normalization: that is what the corpus is for.

The speech is synthetic. A model that reads it well has learned espeak-ng's Hindi, not people's. English is there to
see whether what holds of the one language holds of another: its own grammar, 14 templates, as many clips, the same
voices. The same espeak-ng and libsndfile give the same bytes: made with espeak-ng 1.51, libsndfile 1.2.2.
"""
import argparse
import csv
import io
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

DATA = Path(__file__).parent / "data"
SPLITS = [("train", 1400, "heard"), ("dev", 80, "heard"), ("test", 240, "half"), ("dev", 160, "unheard")]
MAX_SECONDS, MAX_TOKENS = 2.95, 60
# espeak-ng's variants of a voice
VOICES = ["", *(f"+m{i}" for i in (1, 2, 3, 4, 5, 7)), *(f"+f{i}" for i in (1, 2, 3, 4))]
# what is chosen on dev is not chosen for test's voices
UNHEARD = {"test": ["+m6", "+f5"], "dev": ["+m8", "+linda"]}
SETTINGS = [(45, 165), (58, 185)]                 # espeak-ng's pitch (0-99) and speed (words a minute)

HE = ["राम", "मोहन", "राहुल", "अमित", "मेरा भाई", "उसका दोस्त", "वह लड़का"]
SHE = ["सीता", "रीना", "मीरा", "नेहा", "मेरी बहन", "उसकी दोस्त", "वह लड़की"]
NAMES = HE[:4] + SHE[:4]
PLACE = ["घर", "बाज़ार", "स्कूल", "दुकान", "बगीचे", "गाँव", "शहर", "दफ़्तर", "अस्पताल", "स्टेशन"]
TIME = ["आज", "अभी", "रोज़", "सुबह", "शाम को", "रात को", "रविवार को", "सोमवार को"]
EAT = ["चावल", "रोटी", "दाल", "सब्ज़ी", "फल", "मिठाई", "आम"]
DRINK = ["दूध", "चाय", "पानी", "लस्सी"]
NUMBER = {"दो": 2, "तीन": 3, "चार": 4, "पाँच": 5, "सात": 7, "आठ": 8, "दस": 10, "बारह": 12}
PRICE = {"बीस": 20, "पचास": 50, "सौ": 100, "तीस": 30}
THINGS_M = ["आम", "फूल", "कपड़े", "जूते", "कमरे", "अख़बार"]                  # masculine plural
THINGS_F = ["किताबें", "कुर्सियाँ", "गाड़ियाँ", "चाबियाँ", "रोटियाँ", "तस्वीरें"]   # feminine plural
THING_M = ["कमरा", "पंखा", "अख़बार", "जूता", "फूल", "फ़ोन"]
THING_F = ["किताब", "कुर्सी", "गाड़ी", "चाबी", "घड़ी", "तस्वीर"]
LANGUAGE = ["हिंदी", "अंग्रेज़ी", "बंगाली"]

# Free spelling variation: the first is drawn as often as the second.
SPELLINGS = {"हिंदी": "हिन्दी", "बाज़ार": "बाजार", "सब्ज़ी": "सब्जी", "पाँच": "पांच", "गाँव": "गांव", "रुपये": "रुपए",
             "गई": "गयी", "चाहिए": "चाहिये", "दफ़्तर": "दफ्तर", "फ़ोन": "फोन", "ठंडा": "ठण्डा", "सुंदर": "सुन्दर"}


def hindi(rng: random.Random) -> list[str]:
    """One sentence as a list of spoken words; its last item is the closing mark."""
    he, she, place, time = rng.choice(HE), rng.choice(SHE), rng.choice(PLACE), rng.choice(TIME)
    eat, drink, number, price = rng.choice(EAT), rng.choice(DRINK), rng.choice([*NUMBER]), rng.choice([*PRICE])
    masc, fem = rng.choice([(THING_M, "मेरा"), (THING_M, "उसका")]), rng.choice([(THING_F, "मेरी"), (THING_F, "उसकी")])
    a_m, a_f = rng.choice(masc[0]), rng.choice(fem[0])
    many_m, many_f = rng.choice(THINGS_M), rng.choice(THINGS_F)
    a, b = rng.sample(NAMES, 2)
    here, there = rng.sample(PLACE, 2)
    good_m, good_f = rng.choice([("अच्छा", "अच्छी"), ("नया", "नई"), ("पुराना", "पुरानी"), ("सुंदर", "सुंदर"),
                                 ("बड़ा", "बड़ी")])
    language = rng.choice(LANGUAGE)
    return rng.choice([
        f"{he} {time} {place} जाता है ।", f"{she} {time} {place} जाती है ।",
        f"{he} {time} {eat} खाता है ।", f"{she} {time} {eat} खाती है ।",
        f"{he} {time} {drink} पीता है ।", f"{she} {time} {drink} पीती है ।",
        f"मुझे {number} {rng.choice([many_m, many_f])} चाहिए ।", f"{rng.choice([a, b])} को {number} {many_f} चाहिए ।",
        f"यह {a_m} {price} रुपये का है ।", f"यह {a_f} {price} रुपये की है ।",
        f"{a} , {time} {number} बजे आना ।", f"{b} , {place} में {number} बजे मिलना ।",
        f"क्या {a} {place} में है ?", f"क्या {time} {place} में {drink} है ?",
        f"{masc[1]} {a_m} {place} में है ।", f"{fem[1]} {a_f} {place} में है ।",
        f"{here} {there} से बहुत दूर है ।", f"{here} {there} के पास है ।",
        f"{a} और {b} {place} में हैं ।", f"आप {time} {place} क्यों जा रहे हैं ?",
        f"हम {time} {place} में {eat} खाएँगे ।", f"{a} ने {number} {many_m} खरीदे ।",
        f"{b} ने {number} {many_f} खरीदीं ।",
        f"{masc[1]} {a_m} बहुत {good_m} है ।", f"{fem[1]} {a_f} बहुत {good_f} है ।",
        f"{she} कल {place} गई थी ।", f"{he} कल {place} गया था ।",
        f"क्या आप {language} बोलते हैं ?",
        f"{a} {place} में {language} पढ़ाती है ।" if a in SHE else f"{a} {place} में {language} पढ़ाता है ।",
        f"{place} में {number} बड़े पेड़ हैं ।", f"कृपया {rng.choice([a_m, a_f])} {place} में रखिए ।",
        f"आज {place} में पानी बहुत ठंडा है ।", f"{he} {number} बजे सोता है ।", f"{she} {number} बजे उठती है ।",
    ]).split()


PEOPLE = ["Anna", "Peter", "Martin", "Julia", "Robert", "Laura", "my brother", "her friend", "the girl", "our teacher"]
WHERE = ["house", "market", "school", "shop", "garden", "village", "city", "office", "hospital", "station"]
WHEN = ["today", "now", "every day", "this morning", "tonight", "on Sunday", "on Monday"]
FOOD = ["rice", "bread", "soup", "fruit", "cake", "cheese", "fish"]
DRINKS = ["milk", "tea", "water", "coffee"]
COUNT = {"two": 2, "three": 3, "four": 4, "five": 5, "seven": 7, "eight": 8, "ten": 10, "twelve": 12}
COST = {"twenty": 20, "fifty": 50, "thirty": 30, "forty": 40}
THING = ["book", "chair", "car", "key", "clock", "picture", "room", "fan", "shoe", "flower", "phone"]
EN_SPELLINGS = {"colour": "color", "grey": "gray", "favourite": "favorite", "theatre": "theater"}


def english(rng: random.Random) -> list[str]:
    """The same in English."""
    a, b = rng.sample(PEOPLE, 2)
    here, there = rng.sample(WHERE, 2)
    time, food, drink, thing = rng.choice(WHEN), rng.choice(FOOD), rng.choice(DRINKS), rng.choice(THING)
    count, cost = rng.choice([*COUNT]), rng.choice([*COST])
    return rng.choice([
        f"{a} is going to the {here} {time} .", f"{a} likes {food} and {drink} .", f"{b} drinks {drink} {time} .",
        f"{a} bought {count} {thing}s {time} .", f"this {thing} costs {cost} dollars .",
        f"{a} and {b} are at the {here} .",
        f"is {a} at the {here} {time} ?", f"the {here} is near the {there} .",
        f"we eat {food} at the theatre {time} .",
        f"my favourite {thing} is at the {here} .", f"the {thing} has a grey colour .",
        f"come to the {here} at {count} .",
        f"I do not see {count} {thing}s .", f"it is far from the {here} to the {there} .",
    ]).split()


# --voice: language of Whisper, grammar, numbers that may be written as digits, spellings that may be exchanged
LANGUAGES = {"hi": ("hi", hindi, {**NUMBER, **PRICE}, SPELLINGS),
             "en": ("en", english, {**COUNT, **COST}, EN_SPELLINGS)}


def write(words: list[str], numbers: dict[str, int], spellings: dict[str, str], rng: random.Random) -> str:
    """The words as somebody might write them: digits or number words, either of two spellings, marks attached."""
    written = []
    for word in words:
        if word in numbers and rng.random() < 0.4:
            word = str(numbers[word])
        elif word in spellings and rng.random() < 0.5:
            word = spellings[word]
        written.append(word)
    text = " ".join(written)
    for mark in ",।?.":
        text = text.replace(f" {mark}", mark)
    return text


def speak(text: str, voice: str, pitch: int, speed: int) -> np.ndarray:
    """espeak-ng's samples at 16 kHz, float64 in -1..1. It speaks 22,050 Hz: drop the spectrum above 8 kHz and go
    back."""
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", text]
    samples, rate = soundfile.read(io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout))
    n = round(len(samples) * 16000 / rate)
    return np.fft.irfft(np.fft.rfft(samples)[: n // 2 + 1], n) * (n / len(samples))


def fix_serial(ogg: bytes, serial: int) -> bytes:
    """Ogg pages carry a random stream number; write ours, and each page's checksum anew, so that bytes repeat."""
    pages = []
    for page in ogg.split(b"OggS\0")[1:]:
        page = b"OggS\0" + page[:9] + struct.pack("<I", serial) + page[13:17] + bytes(4) + page[21:]
        crc = 0
        for byte in page:                         # CRC-32, polynomial 0x04c11db7, neither reflected nor inverted
            crc ^= byte << 24
            for _ in range(8):
                crc = (crc << 1 ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
        pages.append(page[:22] + struct.pack("<I", crc) + page[26:])
    return b"".join(pages)


def make(voice: str, folder: Path) -> None:
    """Draw the sentences, speak them, write clips/ and the three tables; the old folder goes only when all is made."""
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is not installed and nothing else can make the corpus: apt install espeak-ng")
    from whisper.tokenizer import get_tokenizer
    language, grammar, numbers, spellings = LANGUAGES[voice]
    tokenizer = get_tokenizer(True, language=language, task="transcribe")
    rng, seen, words = random.Random(0), set(), set()
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    (new / "clips").mkdir(parents=True)
    tables, serial = {"train": [], "dev": [], "test": []}, 0
    for split, size, voices in SPLITS:
        rows = []
        while len(rows) < size:
            spoken = grammar(rng)
            n_words = len([w for w in spoken if w not in "।?,."])
            if " ".join(spoken) in seen or not 3 <= n_words <= 7 + (language == "en"):
                continue
            written = write(spoken, numbers, spellings, rng)
            unheard = voices == "unheard" or voices == "half" and len(rows) % 2
            variant, (pitch, speed) = voice + rng.choice(UNHEARD[split] if unheard else VOICES), rng.choice(SETTINGS)
            samples = speak(" ".join(spoken), variant, pitch, speed)
            if len(samples) > MAX_SECONDS * 16000 or len(tokenizer.encode(" " + written)) > MAX_TOKENS:
                continue
            seen.add(" ".join(spoken))
            words.update(spoken)
            name, buffer = f"{folder.name}_{serial:05d}.ogg", io.BytesIO()
            soundfile.write(buffer, samples, 16000, format="OGG", subtype="OPUS", compression_level=1.0)
            (new / "clips" / name).write_bytes(fix_serial(buffer.getvalue(), serial))
            rows.append({"client_id": f"{variant}-p{pitch}-s{speed}", "path": name, "sentence": written, "up_votes": 2,
                         "down_votes": 0, "age": "", "gender": "", "accents": "", "locale": language, "segment": ""})
            serial += 1
        tables[split] += rows
    for split, rows in tables.items():
        with open(new / f"{split}.tsv", "w", encoding="utf8", newline="") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    print(f"{serial} clips, {len(words)} words and marks, in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--voice", choices=LANGUAGES, default="hi")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    make(args.voice, args.out or DATA / f"mini_{args.voice}")
