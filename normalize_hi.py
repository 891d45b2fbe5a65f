"""Hindi text normalizer for a fair word error rate: free spellings of one word meet, two words stay apart.

Whisper's BasicTextNormalizer takes vowel signs for punctuation: "हिन्दी में" becomes "ह न द म", and में, मैं
and माँ all become "म". Here the word stays whole, and its free spellings become one:

    >>> normalize("हिन्दी में २५ लोग।"), normalize("हिंदी मेँ पच्चीस लोग")
    ('हिंदी में पच्चीस लोग', 'हिंदी में पच्चीस लोग')

Rule of decision: merge if and only if it is the same word with the same sound and the spelling is free. A spelling
mistake stays an error (गई/गईं, सुना/सूना, पका/पक्का). Normalize BOTH reference and hypothesis.

How Devanagari is stored. A written syllable (akshara) is
    consonant (+ nukta)  (+ virama + consonant)*  + vowel sign (matra)  + bindu, chandrabindu or visarga
    ड़ों is ड, nukta (another sound), ो (the vowel), ं (nasal); न्द is न, virama (no vowel here), द.
A consonant without a sign carries the vowel a; a vowel that begins a syllable has a letter of its own (अ आ इ). One
look has many encodings, and Hindi has free choices on top. So the steps are, in this order: encoding, numbers,
punctuation, spelling, words. Each relies on the earlier ones and makes no new work for them.

Sources: Unicode Standard, ch. 12.1; Google's nisaba, Deva/visual_rewrite.textproto (vowels that look alike); Kendriya
Hindi Nideshalaya, "Devanagari Script and Standardization of Hindi Spelling" (what is free). Our choices: the dot of
the five loan letters (ज़) is folded, since writers leave it out freely (the price: राज, rule, meets राज़, secret;
nukta=False parts them); ँ and ं are folded but for हँस/हंस and अँगना/अंगना; ड़ ढ़, vowel length, ॉ and whether there
is a nasal are never touched. normalize takes any str, is idempotent, blind to NFC/NFD, and linear in the length.
This file is in NFC, as the text its patterns meet: ज़ is ज and nukta.
"""
import re
import unicodedata
from functools import lru_cache
from itertools import groupby

CHANDRABINDU, BINDU, VISARGA, NUKTA, VIRAMA = "\u0901", "\u0902", "\u0903", "\u093c", "\u094d"
LETTER = "\u0904-\u0939\u0958-\u0961\u0972-\u097f"                   # consonants and vowel letters
MATRA = "\u093a\u093b\u093e-\u094c\u094e\u094f\u0955-\u0957\u0962\u0963"
SIGN = MATRA + "\u0900-\u0903" + NUKTA + VIRAMA                       # whatever hangs on a letter
W = r"\u0900-\u0963\w"                     # inside a word; \w alone leaves out the signs: hence "ह न द म"

# ------------------------------------------------------------------ 1. encoding: one way to store a syllable
RARE = re.compile("[^ -~\u0900-\u093c\u093e-\u094f\u0951-\u097f]")      # not ASCII, not plain Devanagari
# Deleted with all of category Cf: the grapheme joiner, variation selectors, and the avagraha ऽ, which is not spoken
INVISIBLE = re.compile("[\u034f\u093d\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
RAISED = re.compile("(?<=[^ ‐–−+-])([²³¹¼-¾\u2070-\u2089\u2150-\u215f\u2189])")       # NFKC would make 21/2 of 2½
DIGIT, OTHER_DIGIT = re.compile("[0-9]"), re.compile(r"[^\D0-9]")      # of any script
MANY_MARKS = re.compile(r"[^\w\s]{40,}")
# ':' is a visarga between a short vowel and a letter (दु:ख), and after these words; otherwise punctuation
VISARGA_WORDS = ("छ अत पुन प्राय क्रमश अंतत अन्तत स्वत संभवत सम्भवत मुख्यत विशेषत सामान्यत मूलत वस्तुत "
                 "फलत पूर्णत अनुमानत प्रात स्पष्टत साधारणत सर्वत अंशत शनै").replace(" ", "|")
COLON = re.compile(f":(?<=[क-ह{NUKTA}िु]:)(?=[{LETTER}])|(?<![{W}])({VISARGA_WORDS}):")
ABBREVIATION = re.compile(f"॰|0(?<=[{LETTER}{SIGN}]0)(?!\\d)(\\.(?=\\d))?")            # रु0.50 has a number
SIGNS = re.compile(f"([{LETTER}])(?=[{SIGN}]{{2}})"                         # two signs, and not in order
                   f"(?!{NUKTA}?(?:{VIRAMA}|[{MATRA}]?[\u0900-\u0903]?)(?![{SIGN}]))([{SIGN}]+)")
RANK = {NUKTA: 0, VIRAMA: 1, "\u0900": 3, CHANDRABINDU: 3, BINDU: 3, VISARGA: 3}       # a matra ranks 2
STRAY_NUKTA = re.compile(f"{NUKTA}(?<![कखगजडढफ]{NUKTA})")
LOOKALIKE = dict(pair.split("=") for pair in """
    ाे=ो ेा=ो ाै=ौ ैा=ौ ाॅ=ॉ ॅा=ॉ अा=आ अो=ओ आे=ओ अौ=औ आै=औ अॉ=ऑ आॅ=ऑ अॅ=ॲ एॅ=ऍ एे=ऐ उु=ऊ श्रृ=शृ""".split())
LOOKALIKES = re.compile("|".join(LOOKALIKE))
REPH_ON_I = re.compile("र्(?<!र्र्)(?:र्)*[इई]")                       # from the chain's start: linear
MOON_AND_DOT = re.compile(f"ॅ[{CHANDRABINDU}{BINDU}](?<=[{LETTER}{NUKTA}ि-ृ]..)|"
                          f"(ॉ)[{CHANDRABINDU}{BINDU}](?<=[{LETTER}{NUKTA}]..)(?![\u0900-\u0963])")

def one_encoding(text: str) -> str:
    """Nothing invisible (deleted, not spaced: joiners stand inside words), NFKC, lower case, ASCII digits,
    single spaces. ज़ and ऩ have codes of their own: NFC takes the first apart, puts the second together.
    >>> one_encoding("क्\u200dया"), one_encoding("\u095b") == "ज\u093c", one_encoding("ＡＢ\u00a0 १½")
    ('क्या', True, 'ab 1^1/2')"""
    if rare := set(RARE.findall(text)):
        text = text.translate({ord(char): None for char in rare
                               if unicodedata.category(char) == "Cf" or INVISIBLE.match(char)})
        text = RAISED.sub(r"^\1", text)
        # NFKC would make an o of º, and of U+1FFD, an acute accent to NFC, a lone mark.
        for typed, meant in zip("´\u1ffdº˚™٪٫ॐ‐‑", ["'", "'", "°", "°", " ", "%", ".", "ओम", "-", "-"]):
            text = text.replace(typed, meant)
    if len(text) > 4_000:               # unicodedata sorts a run of marks in quadratic time, a sorted one in linear
        def in_order(run: "re.Match[str]") -> str:
            marks = unicodedata.normalize("NFD", "\u034f".join(run[0])).replace("\u034f", "")
            groups = groupby(marks, lambda mark: unicodedata.combining(mark) > 0)
            return "".join(["".join(sorted(group, key=unicodedata.combining)) for _, group in groups])
        text = MANY_MARKS.sub(in_order, text)
    text = unicodedata.normalize("NFKC", text.lower())
    if rare and text != text.lower():                                # NFKC has made a capital: ℃ is °C
        text = unicodedata.normalize("NFKC", text.lower())
    if "ङ" in text:                                                  # ङ with a vowel is in no Hindi word: लङका
        text = unicodedata.normalize("NFKC", re.sub(f"ङ(?!{VIRAMA})", "ड़", text))
    for whole, apart in ("\u0929", "न\u093c"), ("\u0931", "र\u093c"), ("\u0934", "ळ\u093c"), ("\u2044", "/"):
        text = text.replace(whole, apart)
    return " ".join(OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text).split())

def typed_signs(text: str) -> str:
    """Keys that look alike: ':' for the visarga in a word, ॰ or zero for the dot of an abbreviation.
    >>> typed_signs("दु:ख प्राय: कहा: 10:30"), typed_signs("डॉ0 पं॰")
    ('दुःख प्रायः कहा: 10:30', 'डॉ. पं.')"""
    if ":" in text:
        text = COLON.sub(lambda m: (m[1] or "") + VISARGA, text)
    return ABBREVIATION.sub(lambda m: " 0." if m[1] else ".", text)

def akshara_order(text: str) -> str:
    """Nukta, virama, matra, bindu, each once. NFC leaves their order alone: matras have combining class 0.
    >>> akshara_order("बडा\u093c"), akshara_order("म\u0902\u0948"), akshara_order("क\u0940\u0940")
    ('बड़ा', 'मैं', 'की')"""
    def ordered(akshara: "re.Match[str]") -> str:
        signs = re.sub(r"(.)\1+", r"\1", "".join(sorted(akshara[2], key=lambda sign: RANK.get(sign, 2))))
        return akshara[1] + re.sub(f"[{CHANDRABINDU}{BINDU}]{{2,}}", CHANDRABINDU, signs)
    return STRAY_NUKTA.sub("", SIGNS.sub(ordered, text))

def one_vowel(text: str) -> str:
    """Vowels typed in pieces: one round can ready the next (अ ा ै, आ ै, औ). And ॅ or ॉ with a dot, which looks
    like a chandrabindu; but inside a word ॉं can be a loan (बॉंड), so there it stays.
    >>> one_vowel("अ\u093e\u0948र"), one_vowel("लड़ार्इ"), one_vowel("यह\u0949\u0902 ह\u0945\u0902स")
    ('और', 'लड़ाई', 'यहाँ हँस')"""
    while (better := LOOKALIKES.sub(lambda m: LOOKALIKE[m[0]], text)) != text:
        text = akshara_order(better)
    return MOON_AND_DOT.sub(lambda m: ("ा" if m[1] else "") + CHANDRABINDU, REPH_ON_I.sub("ई", text))

# ------------------------------------------------------------------ 2. numbers are read out, as many words as spoken
UNITS = [entry.split("|") for entry in """
शून्य एक दो तीन चार पाँच|पांच छह|छः|छे|छ सात आठ नौ दस ग्यारह बारह तेरह चौदह पंद्रह|पन्द्रह सोलह सत्रह|सतरह
अठारह|अट्ठारह उन्नीस बीस इक्कीस बाईस|बाइस तेईस|तेइस चौबीस पच्चीस छब्बीस सत्ताईस|सत्ताइस|सताईस|सताइस
अट्ठाईस|अट्ठाइस|अठाईस|अठाइस उनतीस|उन्तीस तीस इकतीस|इकत्तीस बत्तीस तैंतीस|तेंतीस|तेतीस|तैतीस|तैंतिस चौंतीस|चौतीस|चौंतिस
पैंतीस|पैतीस|पैंतिस छत्तीस सैंतीस|सैतीस|सैंतिस अड़तीस|अड़तिस उनतालीस|उन्तालीस|उनतालिस चालीस इकतालीस|इकतालिस
बयालीस|बयालिस|ब्यालीस तैंतालीस|तैंतालिस|तैतालीस|तैतालिस चौवालीस|चवालीस|चौंतालीस|चौवालिस पैंतालीस|पैंतालिस|पैतालीस
छियालीस|छयालीस|छियालिस सैंतालीस|सैंतालिस|सैतालीस अड़तालीस|अड़तालिस उनचास|उन्चास पचास इक्यावन|इकयावन बावन तिरेपन|तिरपन
चौवन|चव्वन पचपन छप्पन सत्तावन|सतावन अट्ठावन|अठावन उनसठ साठ इकसठ बासठ तिरेसठ|तिरसठ चौंसठ|चौसठ पैंसठ|पैसठ छियासठ|छयासठ
सड़सठ|सरसठ अड़सठ उनहत्तर|उनहतर सत्तर इकहत्तर|इकत्तर बहत्तर तिहत्तर चौहत्तर पचहत्तर|पिचहत्तर छिहत्तर|छियत्तर
सतहत्तर|सतत्तर अठहत्तर उनासी|उन्नासी|उन्यासी अस्सी इक्यासी बयासी|ब्यासी तिरासी चौरासी पचासी|पिचासी छियासी
सत्तासी|सतासी अट्ठासी|अठासी नवासी नब्बे|नव्वे इक्यानवे|इक्यानबे बानवे|बानबे तिरानवे|तिरानबे चौरानवे|चौरानबे
पंचानवे|पंचानबे|पचानवे|पचानबे छियानवे|छियानबे सत्तानवे|सत्तानबे|सतानवे अट्ठानवे|अट्ठानबे|अठानवे|अठानबे
निन्यानवे|निन्यानबे""".split()]       # 0-99: the canonical form, then other spellings
POWERS = list(zip((10**17, 10**15, 10**13, 10**11, 10**9, 10**7, 10**5, 10**3, 100),
                  "शंख पद्म नील खरब अरब करोड़ लाख हज़ार सौ".split()))
ORDINALS = {"1ल": "पहल", "2र": "दूसर", "3र": "तीसर", "4थ": "चौथ", "6ठ": "छठ"}
CURRENCIES = {chr(c): unicodedata.name(chr(c), "").lower().replace(" sign", "") for c in range(0x20a0, 0x20c1)}
CURRENCIES.update(zip("₹$€£¥₩₺₽₿₫₱₦₪฿৳¢", "रुपये डॉलर यूरो पाउंड येन वॉन लीरा रूबल बिटकॉइन डोंग पेसो नाइरा शेकेल "
                                           "बाट टका सेंट".split()))
UNIT_SIGNS = {"%": "प्रतिशत", "°": "डिग्री", "°c": "डिग्री सेल्सियस", "°f": "डिग्री फ़ारेनहाइट"}
# Only after a number, and only what means one thing there: m is a million too, 5g a network, "एक ली" a verb
UNIT_NAMES = {short: name for entry in """किलोमीटर=km=kms=किमी मीटर=मी=mtr सेंटीमीटर=cm=सेमी मिलीमीटर=mm=मिमी
    किलोग्राम=kg=kgs=किग्रा ग्राम=gm=gms=ग्रा मिलीग्राम=mg=मिग्रा मिलीलीटर=ml लीटर=ltr केबी=kb एमबी=mb जीबी=gb
    टीबी=tb किलोवाट=kw सौ=सौ माइनस=माइनस""".split() for name, *shorts in [entry.split("=")] for short in shorts}
# A unit may follow these too, and a minus stand before them
COUNTS = "सौ हज़ार लाख करोड़ अरब खरब डेढ़ ढाई साढ़े सवा पौने आधा रुपये प्रति वर्ग घन".split() + [e[0] for e in UNITS]
_magnitude = (f" ?(?:सौ|हज़?ार|लाख|करोड़|अरब|ख़?रब|नील|पद्म|शंख|[मब]िलियन|ट्रिलियन|"
              f"lakh|crore|(?:m|b|tr)illion|[mb]n)(?![{W}])")
_figure = r"[0-9][0-9,]*(?:\.[0-9]+)?"
_amount = f"{_figure}(?: ?[-–—−] ?{_figure})?(?:{_magnitude}(?: {_figure}(?={_magnitude}))?)*"
_symbol = "".join(CURRENCIES)
_rs = f"(?:rs|र[ुू])(?<![a-z\u0900-\u0963]..)(?![{W}])"
_tail = " ?/ ?[-–—−=]"                                                 # ₹500/- रुपये says it three times
_again = rf"(?:{_tail})?(?: ?(?:र[ुू]प(?:ये|ए|या)(?![{W}])|{_rs}\.?(?! ?[0-9])))?(?: only(?![{W}]))?"
_open = "(?<![^ (\\[{<>=~,\"'“‘" + _symbol                              # what a sign or a bare decimal may follow
# [...] comes first, since re looks for a set faster than for one of several words
PRICE_BEFORE = re.compile(rf"([rर{_symbol}](?:(?<=[^rर])|(?<![0-9] .)(?:(?<=r)s|(?<=र)[ुू])(?<![{W}]..)"
                          rf"(?:प(?:ये|ए)(?= ?[0-9,.]+{_tail}))?))\.? ?(ऋण |प्लस )?({_amount}){_again}")
PRICE_AFTER = re.compile(rf"([0-9](?:{_magnitude})*)(?: ?([{_symbol}](?! ?[0-9])|{_rs})\.?|{_tail}){_again}")
# A sign touches its number and nothing before it: 5-7, 5 -7, कोविड-19 and "नहीं - 7" have none; nor has धारा -370
PLUS_MINUS = re.compile(
    rf"([-–−+]){_open}].)(?<![0-9%°] .)(?<![0-9][{_symbol}].)(?=(?:[{_symbol}] ?|(?:rs|र[ुू])\.? ?)?[0-9])"
    + "".join(f"(?<!{noun} .)" for noun in "कोविड covid जी चंद्रयान धारा भाग खंड कक्षा वार्ड सेक्टर नंबर".split()))
BARE_DECIMAL = re.compile(rf"\.(?=[0-9]){_open}–−+-]\.)")
YEAR_ZERO = re.compile("0(?<=[12][0-9]{3}[-–−]0)(?<![0-9,.].{5}0)(?=[1-9](?![0-9/–−-]))")         # 2008-09
TELEPHONE = re.compile(rf"[+(0-9](?<![{W}{_symbol}].)(?<![0-9][.,:/].)\(?[0-9]*(?<=[0-9])\)?"
                       "(?:[ –-][0-9]+)+(?![0-9]|[.,:/][0-9])")
DOTTED_UNIT = re.compile(rf"\.(?:(?<=कि\.|से\.|मि\.) ?(मी|ग्रा)|(?<=मि\.) ?ली)(?![{W}])\.?")
SPEED = re.compile(rf"(km|किमी)\.? ?/ ?(?:(घंट[ाे])|hr?)(?![{W}])")
AREA = re.compile("(?<![a-z\u0900-\u0963])([ck]?m|(?:कि|से)?मी)\\^([23])")
# A suffix may stand apart only if it is no word of its own: "कुल 4 थे" is "there were four", not "fourth".
NUMBER = re.compile(rf"([0-9]+(?:[,.:/][0-9]+)*)(?: ?(%|°(?: ?[cf](?![{W}]))?)|( ?बजे)(?![{W}])"
                    rf"|(?:[ –-]?(व[ाीे][ँं]|वी|[रठ][ाीे])|[–-]?(व[ाे]|[लथ][ाीे]))(?![{W}]))?")
CLOCK = re.compile("([01]?[0-9]|2[0-4])[:.]([0-5][0-9])")
FIRST_CLOCK = re.compile(f"(?<![0-9,.:/])({CLOCK.pattern})(?=(?: ?[–-] ?| से )(?:{CLOCK.pattern}) ?बजे(?![{W}]))")
GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}")

def cardinal(n: int) -> str:
    """0 <= n < 10**19 in the Indian system: above a thousand, a new word for every two digits.
    >>> cardinal(12345678), cardinal(1_200_001_947)
    ('एक करोड़ तेईस लाख पैंतालीस हज़ार छह सौ अठहत्तर', 'एक अरब बीस करोड़ एक हज़ार नौ सौ सैंतालीस')"""
    for power, name in POWERS:
        if n >= power:
            return f"{cardinal(n // power)} {name}" + (" " + cardinal(n % power) if n % power else "")
    return UNITS[n][0]

def _read(figure: str) -> str:
    """Digits with , . : / between: 1,00,000 and 100,000 are one number, 1,2,3 is a list, 15.8.1947 a date."""
    whole, _, decimals = figure.partition(".")
    grouped = GROUPED.fullmatch(whole)
    whole = whole.replace(",", "") if grouped else whole
    if whole.isdigit() and (not decimals or decimals.isdigit()):
        by_digit = len(whole) > (19 if grouped else 9) or whole[0] == "0" != whole        # 007, telephone numbers
        words = [UNITS[int(digit)][0] for digit in whole] if by_digit else [cardinal(int(whole))]
        if decimals:
            words += ["दशमलव"] + [UNITS[int(digit)][0] for digit in decimals]
        return " ".join(words)
    for mark in ":/,.":
        if mark in figure:
            parts = figure.split(mark)
            return (" बटा " if mark == "/" and len(parts) == 2 else " ").join(map(_read, parts))

def _number(match: "re.Match[str]") -> str:
    figure, unit, oclock, apart, attached = match.groups()
    clock, suffix = CLOCK.fullmatch(figure), apart or attached or ""
    if clock and (oclock or ":" in figure):
        hour, minute = cardinal(int(clock[1])), int(clock[2])
        words = f"{hour} बजकर {cardinal(minute)} मिनट" if minute else f"{hour} {oclock or ''}"
    elif suffix.startswith("व"):                                              # 7वा and 7वां are typed for 7वाँ
        words = _read(figure) + suffix[:2] + (CHANDRABINDU if suffix[1] == "ा" else BINDU)
    elif figure + suffix[:1] in ORDINALS:
        words = ORDINALS[figure + suffix[0]] + suffix[1]
    else:
        words = f"{_read(figure)} {suffix}{oclock or ''} {UNIT_SIGNS[unit.replace(' ', '')] if unit else ''}"
    return f" {words} "

def _telephone(match: "re.Match[str]") -> str:
    """Digit by digit if it is dialled: 10 to 13 of them that begin with +, or whose later groups have three and more
    each and whose first begins with 0, or with 6 to 9, or stands before five, unless a round sum makes it a range."""
    first, *rest = groups = re.findall("[0-9]+", match[0])
    no_range = not re.search("000(?![0-9])|0-[0-9]*0$", match[0]) and (first[0] in "6789" or max(map(len, rest)) > 4)
    if not (match[0][0] == "+" or min(map(len, rest)) > 2 and (first[0] == "0" or no_range)):
        return match[0]
    digits = "".join(groups)
    return match[0][0].strip("(0123456789") + " ".join(digits) if 10 <= len(digits) <= 13 else match[0]

def numbers_in_words(text: str) -> str:
    """Prices first (the unit is spoken last), then one pass over whole numbers and what hangs on them.

    Commas make an amount, up to 99 शंख (10**17; पद्म is 10**15, नील 10**13); ten digits without are read one by one,
    as are the groups of a telephone number. A minus is ऋण (so is माइनस before a number), a plus प्लस, +91 too. 3-4 is
    both numbers. 1st is the number and st: spoken फ़र्स्ट, another word than पहला. "₹500/- only" is ₹500.
    >>> " ".join(numbers_in_words("5 और 55 7वीं 10:30 बजे ₹2 लाख 1/2 3.14%").split())
    'पाँच और पचपन सातवीं दस बजकर तीस मिनट दो लाख रुपये एक बटा दो तीन दशमलव एक चार प्रतिशत'"""
    text = DOTTED_UNIT.sub(lambda m: (m[1] or "लीलीटर") + " ", text)                                       # मि.ली.
    text = SPEED.sub(lambda m: f"{m[1]} प्रति {m[2] or 'घंटा'}", text) if "/" in text else text
    if not DIGIT.search(text):
        return text
    if "^" in text:
        text = AREA.sub(lambda m: f" {'वर्ग' if m[2] == '2' else 'घन'} {'मी' if m[1] == 'm' else m[1]} ", text)
    text = TELEPHONE.sub(_telephone, BARE_DECIMAL.sub("0.", YEAR_ZERO.sub("", text)))
    text = PLUS_MINUS.sub(lambda m: "प्लस " if m[1] == "+" else "ऋण ", text)
    text = PRICE_BEFORE.sub(lambda m: f"{m[2] or ''}{m[3]} {CURRENCIES.get(m[1], 'रुपये')} ", text)
    text = PRICE_AFTER.sub(lambda m: f"{m[1]} {CURRENCIES.get(m[2], 'रुपये')} ", text)
    text = FIRST_CLOCK.sub(lambda m: m[1].replace(".", ":"), text) if "बजे" in text else text        # 9.30-10.30 बजे
    return NUMBER.sub(_number, text)

# ------------------------------------------------------------------ 3. punctuation: a space, never nothing
LONG_NAMES = "एच एल एम एन एस आर एफ एक्स आई आइ वाई वाइ जेड ज़ेड डब्ल्यू डब्लू".split()         # more than one akshara
LETTER_NAMES = {*LONG_NAMES, *"ए बी सी डी ई जी जे के ओ पी क्यू टी यू वी".split()}
_akshara = f"[{LETTER}]{NUKTA}?(?:{VIRAMA}[{LETTER}]{NUKTA}?)*[{MATRA}]?[{CHANDRABINDU}{BINDU}]?"
_group = f"(?:{'|'.join(LONG_NAMES)}|{_akshara})"
ACRONYM = re.compile(rf"(?<![{W}.])(?:[a-z](?:\.[a-z])+|{_group}(?:\.{_group})+)\.?(?![{W}])")
APOSTROPHE = re.compile("['’‘ʼ`](?<=[a-zß-öø-ɏ].)(?=[a-zß-öø-ɏ])")
PUNCTUATION = re.compile("[^ \u0900-\u0963\\w]")

def acronyms(text: str) -> str:
    """Letters or their names with dots between are one word; a full stop between two words is not.
    >>> acronyms("u.s.a."), acronyms("बी.जे.पी. का"), acronyms("वह था.वे गए")
    ('usa ', 'बीजेपी  का', 'वह था.वे गए')"""
    def join(match: "re.Match[str]") -> str:
        groups = match[0].split(".")                 # three with the empty one after a final dot
        sure = len(groups) > 2 or match[0].isascii() or LETTER_NAMES.issuperset(groups)
        return "".join(groups) + " " if sure else match[0]
    return ACRONYM.sub(join, text) if "." in text[:-1] else text

def punctuation(text: str) -> str:
    """Punctuation and symbols separate words; only an apostrophe in a Latin word goes without a trace.
    >>> punctuation("राम,श्याम (धीरे-धीरे) don’t।").split()
    ['राम', 'श्याम', 'धीरे', 'धीरे', 'dont']"""
    return PUNCTUATION.sub(lambda m: m[0] if unicodedata.category(m[0]) in ("Mn", "Mc") else " ",     # any script's
                           APOSTROPHE.sub("", text.replace("_", " ")))

# ------------------------------------------------------------------ 4. spelling: free choices get one form
LOAN_NUKTA = re.compile(f"{NUKTA}(?<=[कखगजफ]{NUKTA})")
STEMS = {"दुःख": "दुख", "चिन्ह": "चिह्न", "ब्रम्ह": "ब्रह्म", "उज्जवल": "उज्ज्वल",
         "अंतर्राष्ट्र": "अंतरराष्ट्र", "अन्तर्राष्ट्र": "अन्तरराष्ट्र"}
FORMS = dict(pair.split("=") for pair in """एवम्=एवं एवम=एवं स्वयम्=स्वयं स्वयम=स्वयं कौवा=कौआ कौवे=कौए
    कौवों=कौओं रूपया=रुपया रूपये=रुपये रूपए=रुपए रूपयों=रुपयों""".split())
VISARGA_SIBILANT = re.compile(f"{VISARGA}(?<=[{LETTER}{MATRA}{NUKTA}].)(?=([शस]))")
LONG_I = re.compile(f"(ई)(?=या[ँं]$|यो[ँं]$)|ी(?=या[ँं]$)")
NASAL = re.compile("(?:ङ्(?=[क-घ])|ञ्(?=[च-झ])|ण्(?=[ट-ढ])|न्(?=[च-झट-ढत-ध])|म्(?=[प-भ]))"
                   f"(?<=[{LETTER}{MATRA}{NUKTA}]..)(?<!ॅ..)")       # the dot needs a vowel with room for it
DOUBLED = re.compile("र्(?:([क-ह])्(?=\\1)|"                           # and stop + its aspirate: र्द्ध
                     "क्(?=ख)|ग्(?=घ)|च्(?=छ)|ज्(?=झ)|ट्(?=ठ)|ड्(?=ढ)|त्(?=थ)|द्(?=ध)|प्(?=फ)|ब्(?=भ))+")
DOUBLED_T = re.compile("त्(?<!त्त्)(?:त्)+(?=व)")                    # from the chain's start: linear
GLIDE = re.compile(f"य([ेी])(?=[ँं]?(?:ग[ाीे])?$)(?<=[\u0900-\u0963]य.)(?<!{VIRAMA}य.)")
GLIDE_IN_STEM = {"दायी", "जयी", "मयी"}          # giving, victorious, full of; दाई is a midwife, जई oats, मई May

def nukta(word: str) -> str:
    """The dot of the five loan letters क़ ख़ ग़ ज़ फ़ is left out freely. ड़ and ढ़ are sounds of their own.
    >>> nukta("सब्ज़ी"), nukta("लड़की")
    ('सब्जी', 'लड़की')"""
    return LOAN_NUKTA.sub("", word)

def lexical(word: str) -> str:
    """A closed list of words printed in two ways; and visarga before a sibilant is that sibilant, doubled.
    >>> [lexical(word) for word in "दुःखी चिन्ह एवम् रूपये दवाईयाँ निःसंदेह".split()]
    ['दुखी', 'चिह्न', 'एवं', 'रुपये', 'दवाइयाँ', 'निस्संदेह']"""
    for wrong, right in STEMS.items():
        word = word.replace(wrong, right)
    word = VISARGA_SIBILANT.sub(r"\1" + VIRAMA, word)
    return FORMS.get(word) or LONG_I.sub(lambda m: "इ" if m[1] else "ि", word)

def virama(word: str) -> str:
    """Sanskrit marks a final consonant; Hindi does not speak a final a anyway. Inside words: never.
    >>> virama("परिषद्"), virama("सत्य")
    ('परिषद', 'सत्य')"""
    return word if word.endswith("ङ" + VIRAMA) else word.rstrip(VIRAMA)

def nasal(word: str) -> str:
    """Before a stop of its own row, a nasal consonant may be written as a dot on the vowel: ङ् क-घ, ञ् च-झ,
    ण् ट-ढ, न् त-ध, म् प-भ; loans write न् for ञ् and ण् too. Before another nasal, य र ल व श स ह: never.
    >>> [nasal(word) for word in "हिन्दी गङ्गा दिसम्बर इन्टरनेट जन्म".split()]
    ['हिंदी', 'गंगा', 'दिसंबर', 'इंटरनेट', 'जन्म']"""
    return NASAL.sub(BINDU, word)

def doubled(word: str) -> str:
    """After र् a consonant may be doubled without a change of sound; and त्त्व is spoken त्व.
    >>> [doubled(word) for word in "कर्त्तव्य अर्द्ध महत्त्व पत्ता".split()]
    ['कर्तव्य', 'अर्ध', 'महत्व', 'पत्ता']"""
    return DOUBLED.sub("र्", DOUBLED_T.sub("त्", word))

def chandrabindu(word: str) -> str:
    """ँ and ं are used for each other, but for हँस (laugh), हंस (swan) and अँगना (courtyard), अंगना (woman).
    >>> chandrabindu("माँ"), chandrabindu("हँसना"), chandrabindu("हँस")
    ('मां', 'हंसना', 'हँस')"""
    return word if word in ("हँस", "अँगना") else word.replace(CHANDRABINDU, BINDU)

def glide(word: str) -> str:
    """Final ये यी यें यीं येगा after a vowel: this य is a glide and need not be written. ये is a word.
    >>> [glide(word) for word in "गयी नये जायेगा ये दायी".split()]
    ['गई', 'नए', 'जाएगा', 'ये', 'दायी']"""
    return word if word in GLIDE_IN_STEM else GLIDE.sub(lambda m: {"े": "ए", "ी": "ई"}[m[1]], word)


SPELLING = nukta, lexical, virama, nasal, doubled, chandrabindu, glide

# ------------------------------------------------------------------ 5. words: number words, pronoun and case
_oblique = "उस इस किस जिस उन इन किन जिन आप"
JOINS = {case: set(words.split()) for cases, words in (
    ("का के की", _oblique), ("को से में पर", f"{_oblique} हम तुम मुझ तुझ"), ("कि", "जब क्यों हालाँ हालां चूँ चूं"),
    ("ने", f"{_oblique} हम तुम मैं तू उन्हों इन्हों किन्हों जिन्हों")) for case in cases.split()}

def number_words(words: "list[str]", hundreds: dict, units: dict, counts: set) -> "list[str]":
    """One reading for each year (उन्नीस सौ is एक हज़ार नौ सौ); after a number, the name of its unit. Before a
    number माइनस is ऋण: only there, since elsewhere ऋण is a loan.
    >>> " ".join(number_words("पाँच km उन्नीस सौ दो में माइनस छह".split(), *_speller((), True)[1:]))
    'पाँच किलोमीटर एक हज़ार नौ सौ दो में ऋण छह'"""
    for i, word in enumerate(words) if not units.keys().isdisjoint(words) else ():
        if word == "सौ" and i:
            words[i - 1], words[i] = hundreds.get(words[i - 1], (words[i - 1], word))
        elif word == "माइनस" and counts.issuperset(words[i + 1:i + 2] or [""]):
            words[i] = "ऋण"
        elif i and words[i - 1] in counts:
            words[i] = units.get(word, word)
    return words

def join_words(words: "list[str]") -> "list[str]":
    """An oblique pronoun and its case marker are printed as one word or as two; so are four words with कि.
    >>> " ".join(join_words("उस ने पी ली क्यों कि".split()))
    'उसने पी ली क्योंकि'"""
    for i, word in enumerate(words):
        if word in JOINS and i and words[i - 1] in JOINS[word]:
            words[i - 1:i + 1] = words[i - 1] + word, ""
    return [word for word in words if word]

@lru_cache(maxsize=None)                                             # one entry per combination of flags
def _speller(steps: tuple, numbers: bool) -> tuple:
    """Part 4, and one spelling for each number word, as a function that remembers 2**15 words; then the tables
    of number_words in that spelling."""
    spellings = {}
    @lru_cache(maxsize=2**15)
    def spell(word: str) -> str:
        for step in steps:
            word = step(word)
        return spellings.get(word, word)
    forms = [(form + suffix, entry[0] + suffix) for entry in UNITS + [["हज़ार", "हजार"], ["छह", "छठ"]]
             for form in entry for suffix in ("", "वाँ", "वां", "वीं", "वें") if form + suffix != "छठ"]
    spellings.update({spell(form): spell(word) for form, word in forms} if numbers else {})
    spell.cache_clear()
    hundreds = {spell(UNITS[n][0]): " ".join(map(spell, cardinal(100 * n).split())).rsplit(" ", 1)
                for n in range(11, 100)}
    units = {spell(short): spell(name) for short, name in UNIT_NAMES.items()}
    return spell, hundreds, units, {spell(word) for word in COUNTS}

def normalize(text: str, *, numbers: bool = True, nukta: bool = True, lexical: bool = True, virama: bool = True,
              nasal: bool = True, doubled: bool = True, chandrabindu: bool = True, glide: bool = True,
              join: bool = True) -> str:
    """One spelling per word; each flag switches off the step of its name (numbers: both number steps).

    text    any str, a word or a book: reference and hypothesis alike
    return  lower case, single-spaced, stripped, no punctuation, no digits (numbers=False: ASCII digits)
    Raises TypeError if text is not a str."""
    if not isinstance(text, str):
        raise TypeError(f"normalize takes a str, got {type(text).__name__}: decode bytes, loop over a list")
    flags = nukta, lexical, virama, nasal, doubled, chandrabindu, glide
    spell, *number_tables = _speller(tuple(step for step, on in zip(SPELLING, flags) if on), numbers)
    text = one_vowel(akshara_order(typed_signs(one_encoding(text))))
    text = numbers_in_words(text) if numbers else text
    words = [spelt for word in punctuation(acronyms(text)).split()
             if (spelt := spell(word) if len(word) < 50 else spell.__wrapped__(word))]      # too long to remember
    words = number_words(words, *number_tables) if numbers else words
    return " ".join(join_words(words) if join else words)
