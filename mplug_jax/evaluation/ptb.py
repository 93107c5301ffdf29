"""Penn Treebank tokens of captions as the COCO caption suite makes them, without Java.

BLEU, ROUGE-L, METEOR, CIDEr and SPICE are published over captions that went through
`pycocoevalcap.tokenizer.PTBTokenizer`: Stanford CoreNLP 3.4.1's PTBTokenizer with `-lowerCase`,
then a list of punctuation removed. This is a scanner of our own for the same token language,
written against the behaviour of that program: at each position every rule is tried, the longest
match wins (text that a rule only looks at counts), of equal ones the first.

Two traits of the original that change scores are kept: brackets survive as `-lrb-` and the like
(the list of removed punctuation has them in upper case, the tokens are in lower case), and of
`!` and `?` only single ones are removed. One is not: the original reads all captions as one text,
so that for "the letter B." the next caption's first word decides between "b" and "b."; here the end
of a caption ends a sentence ("b"). Left out for rarity in captions: numeric SGML entities, eastern
smileys, file names that start with a digit, abbreviations run into the next word ("etc.a dog").
"""

import re
from collections.abc import Callable

# What `PTBTokenizer` of pycocoevalcap removes, as far as lower-cased tokens can equal it.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))

_LETTER = r"[^\W\d_¼½¾²³¹⅐-⅞]"
_ALNUM = rf"(?:{_LETTER}|\d)"
_APOSTROPHE = "['\x92’]"
_ANY_APOSTROPHE = "['\x91\x92‘’‛`]"  # after a single letter and in n't
_SPACE = "[ \t\xa0\u2000-\u200a\u3000]"
_WORD = rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"
_CLITIC = rf"{_APOSTROPHE}(?:[msdMSD]|re|ve|ll|RE|VE|LL|Re|Ve|Ll)"
_NOT = rf"[nN]{_ANY_APOSTROPHE}[tT]"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_URL_END = r"[^\s\"<>|.!?(){},-]"
_WWW_PART = r"[^\s\"<>|.!?(){},]+\."
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_THING_PART = rf"(?:[dDoOlL]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+"
_HYPHEN = "[-_\u058a\u2010\u2011]"

# Abbreviations that keep their period wherever they stand; then states that are words too and do
# so with a capital; then what does so before a number.
_ABBREVIATIONS = (
    "adm|al|ala|alex|apr|ariz|assn|assoc|asst|attys?|aug|ave|bancorp|bhd|bldg|blvd|brig|bros|calif"
    "|capt|cf|cie|cmdr|col?|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|drs?|esq|est|etc|ext"
    "|feb|fla|fri|ft|ga|gen|govs?|hon|inc|ind|intl|jan|jos|jr|jul|jun|kans?|ky|lieut|lt|ltd|maj|mar"
    "|md|messrs|mfg|mich|minn|mlle|mme|mo|mon|mont|mrs?|ms|mt|natl|neb|nev|nov|oct|okla|penn|pfc|ph"
    "|plc|pres|profs?|ptys|pvt|rd|reps?|rev|rt|sens?|sept?|seq|sgt|spc|sq|sr|ste?|supt|sys|tel|tenn"
    "|thu|thurs|tues?|univ|va|vs|vt|wed|wisc?|wm|wyo"
)
_CAPITAL_ABBREVIATIONS = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBER_ABBREVIATIONS = "art|ca|figs?|nos?|op|pp|prop"
# A single letter with a period keeps it as an initial does, unless one of these, or nothing,
# follows and a sentence ends there.
_STARTERS = (
    "a|about|according|additionally|after|an|as|at|but|earlier|he|her|here|however|if|in|it|last"
    "|many|more|now|once|one|other|our|she|since|so|some|such|that|the|their|then|there|these"
    "|they|this|we|what|when|while|yet|you"
)
_STARTER = f"{_STARTERS.title()}|{_STARTERS.upper()}"
# Words that count as two, and where they are cut.
_CUT_WORDS = (("can", "not"), ("gon|wan", "na"), ("got", "ta"), ("lem|gim", "me"))
_CUT_WORD = "|".join(f"(?:{head}){tail}" for head, tail in _CUT_WORDS)
# Words with an apostrophe in them that are one token.
_APOSTROPHE_WORDS = (
    rf"{_APOSTROPHE}[nN]{_APOSTROPHE}?|[lLdDjJ]{_APOSTROPHE}|[A-HJ-XZn]{_ANY_APOSTROPHE}{_LETTER}{{2,}}"
    rf"|{_LETTER}+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z]{_LETTER}*"
    rf"|(?i:somethin@|ol@|@em|@[2-9]0s|@till?|@cause|nor@easter|c@mon|e@er|s@mores|ev@ry|li@l|nat@l)"
).replace("@", _APOSTROPHE)

_CURRENCY = {"¢": "cents", "£": "#", "¤": "$", "€": "$", "\x80": "$"}
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_QUOTES = {
    **dict.fromkeys("’›\x92", "'"),
    **dict.fromkeys("”»\x94", "''"),
    **dict.fromkeys("‘‹‛\x91", "`"),
    **dict.fromkeys("“«\x93", "``"),
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&apos;": "'"}


def _straight(text: str) -> str:
    return text.replace("’", "'").replace("\x92", "'")


def _quotes(text: str) -> str:
    return "".join(_QUOTES.get(character, character) for character in text)


def _unbroken(text: str) -> str:
    """A token with spaces in it stays one token."""
    return text.replace(" ", "\xa0")


def _escaped(text: str) -> str:
    """Round brackets inside a token (smileys, telephone numbers)."""
    return text.replace("(", _BRACKETS["("]).replace(")", _BRACKETS[")"])


# (token, what has to follow, what the token becomes: itself, a constant or a function of it)
_RULES: list[tuple[str, str, str | Callable[[str], str] | None]] = [
    *((rf"(?i:{head})", rf"(?i:{tail})", None) for head, tail in _CUT_WORDS),
    (rf"{_APOSTROPHE}[tT]", "(?i:is|was)", None),
    (
        r"<(?:[!?][A-Za-z-][^>\r\n]*|/[A-Za-z][A-Za-z0-9:.-]*"
        r"|[A-Za-z][A-Za-z0-9:._-]*(?: +(?:[A-Za-z][A-Za-z0-9:.-]*"
        r"|[A-Za-z][A-Za-z0-9:.-]* *= *(?:'[^'\r\n]*'|\"[^\"\r\n]*\")))* */?) *>",
        "",
        _unbroken,
    ),
    ("[–—―\x96\x97]|&(?:mdash|ndash|MD);", "", "--"),
    ("|".join(_ENTITIES), "", _ENTITIES.get),
    (_WORD, _CLITIC, None),
    (rf"{_LETTER}*[A-MO-Za-mo-z]", _NOT, None),
    (_WORD, "", None),
    (_APOSTROPHE_WORDS, "", None),
    (rf"[yY]{_APOSTROPHE}", _LETTER, None),
    (rf"https?://[^\s\"<>|()]+{_URL_END}", "", None),
    (
        rf"(?:www\.(?:{_WWW_PART})+[a-zA-Z]{{2,4}}|(?:[^\s\"`'<>|!(){{}}$,-_]+\.)+"
        rf"(?:com|net|org|edu))(?:/[^\s\"<>|()]+{_URL_END})?",
        "",
        None,
    ),
    (r"<?[a-zA-Z0-9][^\s\"<>|()]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().]+>?", "", None),
    (r"@[a-zA-Z_][a-zA-Z_0-9]*", "", None),
    (rf"#{_LETTER}+", "", None),
    (_CLITIC, "[^A-Za-z]|$", _straight),
    (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", "", None),
    (rf"[-+]?{_NUMBER}", "", None),
    (r"(?:\d{1,4}[- \xa0])?\d{1,4}/\d{1,4}", "", _unbroken),
    ("|".join(_FRACTIONS), "", _FRACTIONS.get),
    (r"[pP]ro-|[aA]nti-|C\.D\.s|S&P-500|Cap'n|c'est", "", None),
    (rf"{_APOSTROPHE}\d\d", _SPACE, None),
    (rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}", "", None),
    (r"[A-Z]*\$|#", "", None),
    ("|".join(_CURRENCY), "", _CURRENCY.get),
    (rf"(?i:{_ABBREVIATIONS})\.", "", None),
    (rf"(?:{_CAPITAL_ABBREVIATIONS})\.|(?i:ph|ed)\.[dD]\.", "", None),
    (rf"(?i:{_NUMBER_ABBREVIATIONS})\.", rf"{_SPACE}*\d", None),
    ("[A-Za-z]", rf"\.(?:\s*$|\s+(?:(?:{_STARTER}|Mr\.|Ms\.)(?:\s|$)|<[A-Za-z]))", None),
    (rf"(?:{_ACRONYM}|[A-Za-z])\.", "", None),
    (rf"(?:{_WORD}|\d+)\.", "[,;:]", None),
    (
        r"(?:\(\d{2,3}\)[ \xa0]?|(?:\+\+?)?(?:\d{2,4}[- \xa0])?\d{2,4}[- \xa0])"
        r"\d{3,4}[- \xa0]?\d{3,5}"
        r"|(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
        "",
        lambda text: _escaped(_unbroken(text)),
    ),
    ('"|&quot;', "[A-Za-z0-9$]", "``"),
    ('"|&quot;', "", "''"),
    (r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z]|$", _escaped),
    (r"[\^x=~<>]\^|\^_\^|-_-|[oO]_[oO]|[oO]\.[oO]", "", None),
    (r"<<|>>|[<>]", "", None),
    *((re.escape(bracket), "", name) for bracket, name in _BRACKETS.items()),
    ("-", "", None),
    ("-{2,}", "", "--"),
    (r"\.{3,5}|(?:\.[ \xa0]){2,4}\.|…", "", "..."),
    (r"@+|#+|_+|\*+", "", None),
    (r"[,;:]", "", None),
    (r"[?!]+", "", None),
    (r"\.", "", None),
    (rf"{_THING_PART}(?:{_HYPHEN}{_THING_PART})*", "", None),
    (
        rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z0-9]+|{_ACRONYM}\.))+",
        r"[^a-zA-Z0-9.+]|$",
        None,
    ),
    (r"[A-Z]+(?:[+&][A-Z]+)+", "", None),
    ("'", r"[A-Za-z][^ \t\n\r\xa0]", "`"),
    (_CLITIC, "", _straight),
    (_NOT, "", _straight),
    ("''|[`‘’‚‛“”„‟‹›«»\x91-\x94]{1,2}|'", "", _quotes),
    (r"[%&=~^|\\/+°§©®™×÷•·†‡¶¡¿¬±¦¨¯¸´ªº¥]", "", None),
]
_COMPILED = [
    (re.compile(f"({token})(?:{after})" if after else f"({token})"), becomes)
    for token, after, becomes in _RULES
]
# A word of plain letters before a space is a token unless it is one that is cut.
_PLAIN = re.compile(rf"(?!(?i:{_CUT_WORD})\b)[A-Za-z]+(?=\s|$)")
_BLANK = re.compile(r"\s+")


def ptb_tokenize(caption: str) -> str:
    """The caption's tokens in lower case without punctuation, joined by single spaces.

    Empty for a caption of punctuation alone. A token may hold a no-break space (`2 1/2`), as the
    original's do.
    """
    return " ".join(token for token in _tokens(caption) if token not in PUNCTUATION)


def _tokens(caption: str) -> list[str]:
    tokens = []
    position = 0
    while position < len(caption):
        if blank := _BLANK.match(caption, position):
            position = blank.end()
        elif plain := _PLAIN.match(caption, position):
            tokens.append(plain[0].lower())
            position = plain.end()
        else:
            token, position = _longest(caption, position)
            tokens.append(token)
    return [token for token in tokens if token]


def _longest(caption: str, position: int) -> tuple[str, int]:
    """The token at `position` and where it ends; an empty one for a character no rule knows."""
    best, becomes = None, None
    for pattern, replacement in _COMPILED:
        match = pattern.match(caption, position)
        if match and (best is None or match.end() > best.end()):
            best, becomes = match, replacement
    if best is None:
        character = caption[position]
        return (character.lower() if ord(character) < 0x10000 else ""), position + 1
    text = best[1]
    if becomes is not None:
        text = becomes if isinstance(becomes, str) else becomes(text)
    return text.lower(), best.end(1)
