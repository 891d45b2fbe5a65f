"""What run.py reads: tables, clips and sentences as people have them; each fault in a line that says where."""
import os
import unicodedata
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import whisper
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

import run

TOKENIZER = get_tokenizer(True, language="hi", task="transcribe")
NANO = SimpleNamespace(is_multilingual=True, num_languages=99,         # 3 s, 128 tokens
                       dims=ModelDimensions(80, 150, 128, 2, 4, 51865, 128, 128, 2, 4))
SAID = "नमस्ते दुनिया"


def tone(seconds: float = 0.5, rate: int = 16000) -> np.ndarray:
    """A sweep, so that no two parts are alike, with a quiet beginning: an MP3 of varying bit rate."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 + 900 * t) * t) * (t > seconds / 3)).astype(np.float32)


def data(tmp_path: Path, text: str | bytes, split: str = "train", clips: str = "abc") -> Path:
    """A folder with that table, and a.wav, b.wav, c.wav; "→" stands for a tab."""
    (tmp_path / "clips").mkdir(exist_ok=True)
    for name in clips:
        soundfile.write(tmp_path / f"clips/{name}.wav", tone(), 16000)
    (tmp_path / f"{split}.tsv").write_bytes(text if isinstance(text, bytes) else text.replace("→", "\t").encode())
    return tmp_path


def read(folder: Path, split: str = "train", **given) -> run.Clips:
    return run.Clips(NANO, split, run.Settings(data=str(folder), **given))


def refused(folder: Path, *words: str) -> None:
    """The table is refused in one line that has those words."""
    with pytest.raises(run.Stop) as stop:
        read(folder)
    text = str(stop.value)
    assert "\n" not in text and stop.value.code == 2
    assert all(word in text for word in ("train.tsv", *words)), text


# ---- tables

@pytest.mark.parametrize("text, line", [
    ("path→sentence→age\na.wav→नमस्ते→\nb.wav→नम→स्ते→\n", 3),                         # a tab in a sentence
    ("path→sentence\na.wav→नमस्ते\n\n\nb.wav→नम→स्ते\n", 5),                           # blank lines count
    ("path→sentence\r\n\r\na.wav→नमस्ते\r\nb.wav→नम→स्ते\r\n", 4),
    ("\n\npath→sentence\n\na.wav→नमस्ते→\n", 5),                                     # also before the header
    ("path→sentence→age\na.wav→\"नमस्ते\nदुनिया\"→\nb.wav→नमस्ते→\n", 2),         # a quoted line break
    ("path→sentence→age\na.wav→नमस्ते\u2028दुनिया→\nb.wav→x\n", 3),                     # no line break for an editor
])
def test_a_row_of_other_width_is_refused_with_its_line(tmp_path, text, line):
    """Shifted or cut fields would be trained on in silence."""
    refused(data(tmp_path, text), f"line {line} has", "fields")


@pytest.mark.parametrize("text", [
    "path→sentence\na.wav→नमस्ते दुनिया\n", "\ufeffpath→sentence\na.wav→नमस्ते दुनिया",
    "path→sentence\r\na.wav→नमस्ते दुनिया\r\n",
    "path→sentence\ra.wav→नमस्ते दुनिया\r", "age→sentence→path\n\n  \n→  नमस्ते दुनिया →a.wav\n\n"])
def test_tables_as_editors_write_them(tmp_path, text):
    """With or without mark, CRLF, CR, blank lines and a last line break: the same one clip."""
    clips = read(data(tmp_path, text))
    assert clips.sentences == [SAID] and clips.paths == [tmp_path / "clips/a.wav"]


def test_quotation_marks_are_characters(tmp_path):
    clips = read(data(tmp_path, 'path→sentence\na.wav→"नमस्ते\nb.wav→"नम" "स्ते"\nc.wav→\'नमस्ते\n'))
    assert clips.sentences == ['"नमस्ते', '"नम" "स्ते"', "'नमस्ते"]


@pytest.mark.parametrize("raw, line", [
    ("path\tsentence\na.wav\tनमस्ते".encode("utf-16"), 1), ("path\tsentence\na.wav\tनमस्ते".encode("utf-16-le"), 1),
    ("path\tsentence\na.wav\tनमस्ते\nb.wav\tब".encode() + b"\xe9\n", 3), (b"path\tsentence\n\r\na.wav\tx\0y\n", 3)])
def test_other_encodings_are_refused(tmp_path, raw, line):
    """UTF-16 with a mark and without, Latin-1, NUL: UTF-8 is asked for, and the line is named."""
    refused(data(tmp_path, raw), "UTF-8", f"line {line} ")


@pytest.mark.parametrize("header", [
    "path→text→age", "path→path→sentence", "path→sentence→sentence", "path,sentence,age"])
def test_columns_are_there_once(tmp_path, header):
    refused(data(tmp_path, header + "\na.wav→नमस्ते→x\n"), "path and sentence once each")


def test_a_field_may_be_long(tmp_path):
    """Beyond the 131,072 characters of the csv module: nothing in another column, too many tokens in a sentence."""
    long = "नमस्ते " * 30000
    clips = read(data(tmp_path, f"path→sentence→age\na.wav→{SAID}→{long}\nb.wav→{long}→\n"))
    assert clips.sentences == [SAID] and clips.left_out == "left out: 1 over 128 tokens"
    refused(data(tmp_path, f"path→sentence\na.wav→{SAID}\n{'a' * 140000}.wav→{SAID}\n"), "line 3")


# ---- paths

@pytest.mark.parametrize("name", ["", "../a.wav", "..\\a.wav", "/a.wav", "x/../../a.wav"])
def test_paths_stay_inside(tmp_path, name):
    refused(data(tmp_path, f"path→sentence\na.wav→नमस्ते\n\n{name}→नमस्ते\n"), "line 4", "stay inside")


def test_names_spelled_alike_are_found(tmp_path):
    """A backslash as on Windows, another case, another Unicode normalization, a symbolic link."""
    folder = data(tmp_path, "path→sentence\n.\\sub\\é.wav→नमस्ते\nA.WAV→नमस्ते\né.wav→नमस्ते\nlink.wav→नमस्ते\n")
    (folder / "clips/sub").mkdir()
    for name in ("sub/é.wav", unicodedata.normalize("NFD", "é.wav")):
        (folder / "clips" / name).write_bytes((folder / "clips/a.wav").read_bytes())
    (folder / "clips/link.wav").symlink_to(folder / "clips/b.wav")
    clips = read(folder)
    assert [path.name for path in clips.paths] == ["é.wav", "a.wav", unicodedata.normalize("NFD", "é.wav"), "link.wav"]
    assert all(path.is_file() for path in clips.paths)
    (folder / "clips/b.wav").unlink()
    refused(folder, "line 5", "link.wav", "1 of 4 rows")


def test_what_spoils_a_figure_is_said(tmp_path):
    """A clip twice in test, two that are in train, a sentence that is in train: counted beside what is left out."""
    folder = data(tmp_path, "path→sentence\na.wav→नमस्ते\nb.wav→दुनिया\n")
    data(tmp_path, "path→sentence\nc.wav→हाँ\nc.wav→हाँ\n./a.wav→नमस्ते\nb.wav→।\n", "test")
    assert read(folder, "train").left_out == ""
    assert read(folder, "test").left_out == (
        "left out: 1 without text; 1 named twice; 1 in train too; 1 with a sentence of train")
    (folder / "train.tsv").unlink()
    assert read(folder, "test").left_out == "left out: 1 without text; 1 named twice"


# ---- sentences

@pytest.mark.parametrize("token", ["<|endoftext|>", "<|hi|>", "<|0.00|>", "<|notimestamps|>"])
def test_special_tokens_are_refused(tmp_path, token):
    """In a sentence they would steer the model."""
    refused(data(tmp_path, f"path→sentence\na.wav→नमस्ते\nb.wav→नम{token} स्ते\n"), "line 3", token)


def test_what_only_looks_special_is_text(tmp_path):
    said = ["<| नमस्ते", "<|नमस्ते|>", "<|yue|> नमस्ते", "नमस्ते |>"]        # 99 languages: Cantonese has no token
    clips = read(data(tmp_path, "path→sentence\n" + "".join(f"a.wav→{text}\n" for text in said)))
    assert [TOKENIZER.decode(tokens[4:-1]) for tokens in clips.tokens] == [" " + text for text in said]
    assert all(max(tokens[4:-1]) < TOKENIZER.eot for tokens in clips.tokens)


@pytest.mark.parametrize("language, silent", [
    ("hi", "। — … ॥ !"), ("en", "… (laughs) um"), ("th", "… ๚ \u200b"), ("ur", "۔ \u200c ـ")])
def test_where_nothing_is_said_is_left_out(tmp_path, language, silent):
    """Punctuation and what else the normalizer deletes leave no word to get wrong."""
    nothing = "".join(f"b.wav→{text}\n" for text in silent.split())
    folder = data(tmp_path, f"path→sentence\na.wav→{SAID}\nc.wav→\n{nothing}")
    clips = read(folder, language=language)
    assert len(clips) == 1 and clips.left_out == f"left out: {len(silent.split()) + 1} without text"


# ---- audio

KINDS = {"wav": ("WAV", "PCM_16"), "aiff": ("AIFF", "PCM_16"), "au": ("AU", "PCM_16"), "flac": ("FLAC", "PCM_16"),
         "vorbis.ogg": ("OGG", "VORBIS"), "opus.ogg": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III")}


def sound(path: Path, kind: str, change=lambda raw: raw) -> Path:
    """Two seconds in that format, its bytes changed."""
    soundfile.write(path, tone(2, 48000), 48000, format=KINDS[kind][0], subtype=KINDS[kind][1])
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_is_refused_at_the_start(tmp_path, kind):
    """Half of it, or nine tenths, are gone; the whole has its two seconds."""
    for left in (0.5, 0.9):
        with pytest.raises(run.Stop, match="x.bin is"):
            run.duration(sound(tmp_path / "x.bin", kind, lambda raw: raw[: int(left * len(raw))]))
    if kind.endswith("ogg"):                     # at a boundary of its pages: only the flag of the last one tells
        with pytest.raises(run.Stop, match="x.bin is"):
            run.duration(sound(tmp_path / "x.bin", kind, lambda raw: raw[: raw.rindex(b"OggS")]))
    whole = sound(tmp_path / "x.bin", kind)
    assert run.duration(whole) == 2 and len(run.read_audio(whole)) == 32000


def hole(change, raw: bytes) -> bytes:
    """The fifth in the middle changed."""
    start, end = len(raw) * 4 // 10, len(raw) * 6 // 10
    return raw[:start] + change(end - start) + raw[end:]


@pytest.mark.parametrize("kind", ["flac", "vorbis.ogg", "opus.ogg", "mp3"])
@pytest.mark.parametrize("change", [bytes, os.urandom, lambda n: b""], ids=["zeros", "noise", "lost"])
def test_a_hole_is_refused_when_it_is_read(tmp_path, kind, change):
    """The fifth in the middle overwritten or missing: libsndfile gives less than there was, and says nothing."""
    with pytest.raises(run.Stop, match="x.bin is"):
        run.read_audio(sound(tmp_path / "x.bin", kind, partial(hole, change)))


def test_a_hole_met_by_a_decoding_process_is_one_sentence(tmp_path, monkeypatch):
    """The DataLoader brings the error from its process with a traceback; the user gets the sentence."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)       # for the process to leave
    folder = data(tmp_path, "path→sentence\na.wav→नमस्ते\n")
    sound(folder / "clips/a.wav", "flac", partial(hole, bytes))
    clips, s = read(folder), run.Settings(workers=1, device="cpu")
    try:
        next(iter(run.batches(clips, s, [(0,)], 1)))
    except run.Stop as stop:
        text = str(stop).strip()
    assert text.startswith(str(folder / "clips/a.wav")) and "Traceback" not in text and "\n" not in text


def test_a_size_not_known_when_it_was_written(tmp_path):
    """WAV from a pipe has sizes of 2^32 - 1 or about 2^31: the sound goes to the end of the file."""
    for size in (2 ** 32 - 1, 2 ** 31 - 1, 2 ** 31 - 4096):
        size = size.to_bytes(4, "little")
        path = sound(tmp_path / "x.wav", "wav", lambda raw: raw[:4] + size + raw[8:40] + size + raw[44:])
        assert run.duration(path) == 2 and len(run.read_audio(path)) == 32000
    flac = sound(tmp_path / "x.flac", "flac", lambda raw: raw[:21] + bytes([raw[21] & 0xF0]) + bytes(4) + raw[26:])
    with pytest.raises(run.Stop, match="unknown length"):
        run.read_audio(flac)


def test_an_mp3_without_xing_header(tmp_path):
    """libsndfile takes the first frame's bit rate for that of all: refused if they differ, right if they do not."""
    def without(raw: bytes) -> bytes:
        return raw[raw.index(b"\xff\xfb", max(raw.find(b"Xing"), raw.find(b"Info"))):]
    for samples in (tone(2, 48000), tone(2, 48000)[::-1]):             # quiet first, loud first
        soundfile.write(tmp_path / "x.mp3", samples, 48000)
        (tmp_path / "x.mp3").write_bytes(without((tmp_path / "x.mp3").read_bytes()))
        with pytest.raises(run.Stop, match="Xing header"):
            run.read_audio(tmp_path / "x.mp3")
    soundfile.write(tmp_path / "x.mp3", tone(2, 48000), 48000, bitrate_mode="CONSTANT", compression_level=0.5)
    (tmp_path / "x.mp3").write_bytes(without((tmp_path / "x.mp3").read_bytes()) + b"TAG" + bytes(125))
    assert abs(len(run.read_audio(tmp_path / "x.mp3")) - 32000) < 1600


@pytest.mark.parametrize("name", ["x.raw", "x.g722", "x.gsm", "x.vox", "x.sd2", "x"])
def test_sound_without_a_header_is_refused(tmp_path, name):
    """Whatever its name makes of it."""
    folder = data(tmp_path, f"path→sentence\na.wav→नमस्ते\n{name}→नमस्ते\n")
    (folder / "clips" / name).write_bytes(np.random.default_rng(0).bytes(4000))
    refused(folder, "line 3", name, "no readable audio")


def test_a_name_does_not_make_the_format(tmp_path):
    sound(tmp_path / "x.raw", "opus.ogg")
    assert len(run.read_audio(tmp_path / "x.raw")) == 32000


def test_empty_files_are_left_out(tmp_path):
    """No byte, or a header alone: two of three clips are counted, the third is there."""
    folder = data(tmp_path, f"path→sentence\na.wav→{SAID}\nb.wav→नमस्ते\nc.wav→नमस्ते\n")
    (folder / "clips/b.wav").write_bytes(b"")
    soundfile.write(folder / "clips/c.wav", np.zeros(0), 16000)
    clips = read(folder)
    assert clips.sentences == [SAID] and clips.left_out == "left out: 2 without sound"


def test_every_fault_is_counted_and_the_first_told(tmp_path):
    folder = data(tmp_path, "path→sentence\na.wav→नमस्ते\n\nx.wav→नमस्ते\nb.wav→<|hi|>\ny.wav→नमस्ते\n")
    refused(folder, "line 4: ", "x.wav is no file", "(3 of 4 rows have a fault)")


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_kinds_of_wav(tmp_path, subtype):
    """8 to 64 bits, six channels, 96 kHz: the sound as it was, but for the bits."""
    t = np.arange(48000) / 96000
    wave = 0.5 * np.sin(2 * np.pi * t) ** 2 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / "x.wav", np.stack([wave] * 6, 1), 96000, subtype=subtype)
    audio = run.read_audio(tmp_path / "x.wav")
    assert len(audio) == 8000 and np.abs(audio - wave[::6]).max() < 0.02


def test_channels_that_cancel(tmp_path):
    """Stereo out of phase has silence for its mean: one channel is taken. Five silent channels of six: the mean."""
    wave = tone()
    soundfile.write(tmp_path / "x.wav", np.stack([wave, -0.98 * wave], 1), 16000, subtype="FLOAT")
    assert np.array_equal(run.read_audio(tmp_path / "x.wav"), wave)
    soundfile.write(tmp_path / "x.wav", np.stack([wave] + [0 * wave] * 5, 1), 16000, subtype="FLOAT")
    assert np.allclose(run.read_audio(tmp_path / "x.wav"), wave / 6)


# ---- languages

DIMS = ModelDimensions(n_mels=80, n_audio_ctx=150, n_audio_state=32, n_audio_head=1, n_audio_layer=1, n_vocab=51865,
                       n_text_ctx=64, n_text_state=32, n_text_head=1, n_text_layer=1)


@pytest.mark.parametrize("language, n_vocab", [("en", 51864), ("hi", 51865), ("en", 51865), ("yue", 51866)])
def test_the_prompt_is_the_one_that_decoding_gives(tmp_path, language, n_vocab):
    """English-only, 99 languages and 100: prompt, text and end have the ids that whisper.decode would use."""
    model = Whisper(replace(DIMS, n_vocab=n_vocab))
    s = run.Settings(data=str(data(tmp_path, "path→sentence\na.wav→good morning\n")), language=language, workers=0)
    clips = run.Clips(model, "train", s)
    options = whisper.DecodingOptions(language=language, without_timestamps=True, fp16=False)
    task = whisper.decoding.DecodingTask(model, options)
    assert clips.n_start == (2 if n_vocab == 51864 else 4)
    text = task.tokenizer.encode(" good morning")
    assert clips.tokens == [[*task.initial_tokens, *text, task.tokenizer.eot]]


# ---- many clips

def test_processes_find_what_one_finds(tmp_path):
    """2,004 rows, looked at in two processes and in one: the same clips, tokens, words about what is left out; the
    first fault is named, all are counted."""
    rows = [("abc"[i % 3] + ".wav", f"वाक्य {i}" if i % 5 else "।") for i in range(2004)]
    folder = data(tmp_path, "path→sentence\n" + "".join(f"{path}→{text}\n" for path, text in rows))
    (folder / "clips/c.wav").write_bytes(b"")
    one, two = (read(folder, workers=n) for n in (0, 2))
    assert one.paths == two.paths and one.tokens == two.tokens and one.sentences == two.sentences
    assert one.left_out == two.left_out == "left out: 267 without text, 668 without sound; 1067 named twice"
    rows[700] = rows[1500] = ("no.wav", "नमस्ते")
    data(tmp_path, "path→sentence\n" + "".join(f"{path}→{text}\n" for path, text in rows), clips="")
    with pytest.raises(run.Stop, match="line 702: .*no.wav is no file.*2 of 2,004 rows"):
        read(folder, workers=2)


@pytest.mark.parametrize("language, n_vocab, words", [
    ("yue", 51865, ["yue", "99", "large-v3"]), ("hi", 51864, ["English alone"])])
def test_a_language_that_the_checkpoint_lacks(tmp_path, language, n_vocab, words):
    """Said before anything is read or trained."""
    run.prune.save(Whisper(replace(DIMS, n_vocab=n_vocab)), tmp_path / "x.pt")
    with pytest.raises(run.Stop) as stop:
        run.load_model(run.Settings(model=str(tmp_path / "x.pt"), language=language, device="cpu"))
    assert all(word in str(stop.value) for word in words)


@pytest.mark.parametrize("language, said, word", [
    ("mr", "दऱ\u094d\u200dया", "दऱ\u094dया"), ("ne", "गर\u094d\u200dयो", "गर\u094dयो"),
    ("bn", "র\u200d\u09cdয", "র\u09cdয"),
    ("fa", "می\u200cروم", "میروم"), ("si", "ක\u0dca\u200dර", "ක\u0dcaර"), ("ml", "അവന\u0d4d\u200d", "അവൻ"),
    ("ml", "അവന\u0d4d", "അവന\u0d4d"),
    ("bn", "হঠাত\u09cd\u200d", "হঠাৎ"), ("ar", "كـــتاب", "كتاب"), ("ar", "\ufefb", "لا"), ("mn", "ᠠ\u180bᠨ", "ᠠᠨ"),
    ("de", "Schiff\xadfahrt", "schifffahrt"), ("ko", "한\ufe0f글", "한글"), ("uk", "м’ята", "мята"),
    ("uk", "м'ята", "мята"), ("uk", "мʼята", "мята"), ("uz", "oʻzbek", "ozbek"), ("uz", "o`zbek", "ozbek"),
    ("fr", "l’eau", "leau"), ("he", "צה״ל", "צהל"),
    ("bn", "দু'টি", "দুটি"), ("fr", "« l'eau », dit-il", "leau dit il"), ("fr", "'eau' 'a'", "eau a"),
    ("am", "ሰላም፡ልዑል", "ሰላም ልዑል"),
    ("ja", "ｶﾞｰｾﾞ", "ガ ー ゼ"), ("zh", "你好，世界！ＡI", "你 好 世 界 a i"), ("bo", "བོད་ཡིག", "བ ོ ད ཡ ི ག"),
    ("km", "ខ្មែរ\u200bខ្មែរ", " ".join("ខ្មែរខ្មែរ")),
    ("jw", "sugeng enjing", "sugeng enjing"), ("ko", "안녕 하세요", "안녕 하세요")])
def test_one_word_stays_one(language, said, word):
    """Joiners, stretches, selectors and apostrophes stand inside words; without spaces, a word is a character."""
    assert run.normalizer(language)(said) == word
    assert run.normalizer(language)(word) == word or language in run.SPACELESS


@pytest.mark.parametrize("language, said, heard, rate", [
    ("th", "สวัสดี ครับ", "สวัสดีคราบ", 10), ("yue", "你好，世界", "你好世間！", 25), ("my", "ကောင်း", "ကောင်း", 0)])
def test_characters_count_where_there_are_no_spaces(language, said, heard, rate):
    """One character of ten, one of four: the rate of errors is theirs, spaces of the transcript do not count."""
    clean = run.normalizer(language)
    scores = run.score([clean(said)], [clean(heard)], 0, language)
    assert scores["wer"] == scores["cer"] == pytest.approx(rate) and scores["wer_ci95"] == pytest.approx([rate, rate])
    assert scores["words"] == [len(clean(said).split())] and scores["unit"] == "character"


def test_the_table_says_what_was_counted():
    """CER in WER's place, in the header and in a line below, in 80 columns; not where words count."""
    row = {"name": "x"} | dict.fromkeys(
        ("parameters", "block_parameters", "block_nonzero", "memory_bytes", "flops", "latency_ms"), 1)
    spaceless, spaced = (run.table([row | run.score([text], [text], 0, language)]) for language, text in (
        ("zh", "你 好"), ("en", "7 2")))          # Whisper's normalizer writes seven and two so: still words
    assert "WER" not in spaceless.split("\n")[1] and "characters" in spaceless.split("\n")[-1]
    assert "WER" in spaced.split("\n")[1] and "characters" not in spaced and max(map(len, spaceless.split("\n"))) <= 80
