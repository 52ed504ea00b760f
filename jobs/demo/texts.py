"""Sentences with one date, amount of money, duration or time of day in them, and its normal form.

Everything is made here from templates and seeds; nothing is taken from anywhere. A value is either for training or held
out, by a hash of its normal form, so no date, amount, duration or time of the held-out rows was ever seen in training.

What could be read in two ways is not made: numeric dates with slashes carry their convention ("DD/MM/YYYY"), dates with
dots are day first, a separator before exactly three digits groups thousands, a dollar is a US dollar, and a two-digit
year stands for 1950 to 2049.
"""

from __future__ import annotations

import datetime
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

HELD_OUT_ONE_IN = 10
NAMED_VALUES = ("12:00", "00:00", "PT30M", "PT45M", "PT1H30M")
"""Noon, midnight, half an hour, ...: names of one value, which could not be learnt if the value were held out."""
KINDS = ("date", "money", "duration", "time")

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
SHORT_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINALS = {
    1: "first", 2: "second", 3: "third", 5: "fifth", 8: "eighth", 9: "ninth", 12: "twelfth", 20: "twentieth",
    30: "thirtieth",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One example: the sentence, what kind of value is in it, and the value's normal form."""

    text: str
    kind: str
    expected: str


def held_out(expected: str) -> bool:
    """Whether this value is kept from training."""
    return zlib.crc32(expected.encode()) % HELD_OUT_ONE_IN == 0 and expected not in NAMED_VALUES


def number_words(n: int, british: bool = True, hyphen: str = "-") -> str:
    """A number from 0 to 999,999 in English words; `british` puts "and" before the last two digits."""
    if n < 20:
        return UNITS[n]
    if n < 100:
        return TENS[n // 10] + (hyphen + UNITS[n % 10] if n % 10 else "")
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    head = f"{number_words(n // size, british, hyphen)} {name}"
    rest = n % size
    if not rest:
        return head
    joint = " and " if british and rest < 100 else " "
    return head + joint + number_words(rest, british, hyphen)


def ordinal(n: int) -> str:
    """1st, 2nd, 3rd, 4th, ..."""
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def ordinal_words(n: int) -> str:
    """first, second, ... for 1 to 39."""
    if n in ORDINALS:
        return ORDINALS[n]
    if n < 20:
        return UNITS[n] + "th"
    return f"{TENS[n // 10]}-{ordinal_words(n % 10)}"


def year_words(year: int, rng: Random) -> str:
    """1999: nineteen ninety-nine; 2003: two thousand and three or twenty oh three; 2021: twenty twenty-one."""
    century, rest = divmod(year, 100)
    if rest == 0:
        return "two thousand"
    if century == 20 and rest < 10:
        return rng.choice(
            (f"two thousand and {UNITS[rest]}", f"two thousand {UNITS[rest]}", f"twenty oh {UNITS[rest]}")
        )
    return f"{number_words(century)} {number_words(rest)}"


def write_date(date: datetime.date, rng: Random) -> str:
    """The date in one of about thirty ways, with or without its weekday."""
    day, month, year = date.day, date.month, date.year
    name = MONTHS[month - 1]
    if rng.random() < 0.5:
        name = SHORT_MONTHS[month - 1]
        name += "." if rng.random() < 0.2 and name != "May" else ""
    yyyy = str(year)
    short = f"'{year % 100:02}"
    if rng.random() < 0.15:
        yyyy = short
    weekday = WEEKDAYS[date.weekday()]
    style = rng.randrange(21)
    if style == 0:
        return rng.choice((f"{year}-{month:02}-{day:02}", f"{year}/{month:02}/{day:02}", f"{year}{month:02}{day:02}"))
    if style == 1:
        return rng.choice((f"{day:02}.{month:02}.{year}", f"{day}.{month}.{year}", f"{day}. {name} {year}"))
    if style in (2, 3, 20):
        pad = rng.random() < 0.5
        d, m = (f"{day:02}", f"{month:02}") if pad else (str(day), str(month))
        first, second, label = rng.choice(((d, m, "DD/MM/YYYY"), (m, d, "MM/DD/YYYY")))
        label = label if rng.random() < 0.7 else label.lower()
        separator = rng.choice("//-")
        label = label.replace("/", separator)
        return f"{first}{separator}{second}{separator}{year} ({label})"
    if style == 4:
        return f"{day:02}{rng.choice('- ')}{SHORT_MONTHS[month - 1]}{rng.choice('- ')}{year}"
    if style == 5:
        return f"the {ordinal_words(day)} of {MONTHS[month - 1]}, {year_words(year, rng)}"
    if style == 6:
        return f"{MONTHS[month - 1]} the {ordinal_words(day)}, {rng.choice((yyyy, year_words(year, rng)))}"
    if style == 7:
        return f"the {ordinal_words(day)} of {name} {yyyy}"
    forms = (
        f"{day} {name} {yyyy}",
        f"{name} {day}, {yyyy}",
        f"{name} {day} {yyyy}",
        f"{name} {ordinal(day)}, {yyyy}",
        f"{name} {ordinal(day)} {yyyy}",
        f"the {ordinal(day)} of {name}, {yyyy}",
        f"the {ordinal(day)} of {name} {yyyy}",
        f"{ordinal(day)} {name} {yyyy}",
        f"{year} {name} {day}",
        f"{weekday}, {name} {day}, {yyyy}",
        f"{weekday} {ordinal(day)} {name} {yyyy}",
        f"{weekday}, {day} {name} {yyyy}",
        f"{weekday[:3]}, {day:02} {SHORT_MONTHS[month - 1]} {year}",
        f"{weekday} the {ordinal(day)} of {name} {yyyy}",
    )
    return rng.choice(forms)


@dataclass(frozen=True)
class Currency:
    """How one currency is written."""

    code: str
    symbols: tuple[str, ...]
    one: str
    many: str
    cent: str = ""
    cents: str = ""
    informal: tuple[str, ...] = ()


CURRENCIES = (
    Currency("USD", ("$", "US$", "USD "), "dollar", "dollars", "cent", "cents", ("bucks",)),
    Currency("USD", ("$", "US$", "USD "), "US dollar", "US dollars", "cent", "cents"),
    Currency("EUR", ("€", "€ ", "EUR "), "euro", "euros", "cent", "cents"),
    Currency("GBP", ("£", "GBP "), "pound", "pounds", "penny", "pence", ("quid",)),
    Currency("CHF", ("CHF ", "Fr. "), "Swiss franc", "Swiss francs"),
    Currency("JPY", ("¥", "JPY "), "yen", "yen"),
)


def group(digits: str, separator: str) -> str:
    """Digits in groups of three from the right."""
    head = len(digits) % 3
    groups = [digits[:head]] if head else []
    return separator.join(groups + [digits[i : i + 3] for i in range(head, len(digits), 3)])


def write_number(whole: int, cents: int, rng: Random) -> str:
    """An amount in digits, with the separators of some country; no decimals only where there are no cents."""
    thousands, decimal = rng.choice(((",", "."), (",", "."), (".", ","), (" ", ","), ("", "."), ("", ","), ("'", ".")))
    digits = group(str(whole), thousands)
    if cents == 0 and rng.random() < 0.6:
        return digits
    return f"{digits}{decimal}{cents:02}"


def write_money(whole: int, cents: int, currency: Currency, rng: Random) -> str:
    """The amount in digits with a symbol, a code or a name, or in words."""
    name = currency.one if whole == 1 and not cents else currency.many
    if currency.cents and rng.random() < 0.25 and whole < 1000:
        return write_coins(whole, cents, currency, rng)
    if whole and whole % 100_000 == 0 and not cents and rng.random() < 0.7:
        return write_millions(whole, currency, rng)
    if not cents and 0 < whole < 10_000 and rng.random() < 0.3:
        words = number_words(whole, rng.random() < 0.6, rng.choice("-- "))
        if 1000 < whole < 10_000 and whole % 100 == 0 and whole % 1000 and rng.random() < 0.5:
            words = f"{number_words(whole // 100)} hundred"
        return f"{words} {rng.choice((*currency.informal, name)) if whole > 1 else name}"
    if not cents and currency.informal and rng.random() < 0.1 and whole > 1:
        return f"{whole} {currency.informal[0]}"
    number = write_number(whole, cents, rng)
    style = rng.randrange(3)
    if style == 0:
        return rng.choice(currency.symbols) + number
    if style == 1:
        return f"{number} {rng.choice((currency.code, currency.symbols[0].strip()))}"
    return f"{number} {name}"


def write_coins(whole: int, cents: int, currency: Currency, rng: Random) -> str:
    """Whole units and cents each with its name: "12 dollars and fifty cents", "80 pence"."""
    words = rng.random() < 0.5

    def count(n: int, one: str, many: str) -> str:
        return f"{number_words(n) if words else n} {one if n == 1 else many}"

    parts = [count(whole, currency.one, currency.many)] if whole or not cents else []
    euro = "euro " if currency.code == "EUR" and not whole else ""  # cents alone are of a dollar
    parts += [count(cents, euro + currency.cent, euro + currency.cents)] if cents else []
    return rng.choice((" and ", ", ", " ")).join(parts) if not words else " and ".join(parts)


def write_millions(whole: int, currency: Currency, rng: Random) -> str:
    """A multiple of 100,000 as "3.2 million"."""
    tenths = whole // 100_000
    number = f"{tenths // 10}.{tenths % 10}" if tenths % 10 else str(tenths // 10)
    if rng.random() < 0.5:
        return f"{currency.symbols[0].strip()}{number} million"
    return f"{number} million {currency.many}"


def write_duration(parts: dict[str, int], rng: Random) -> str:
    """Parts by ISO unit letter (Y, M, W, D before TH, TM, TS) in words, digits or short forms."""
    units = {
        "Y": ("year", "yr"), "M": ("month", "month"), "W": ("week", "wk"), "D": ("day", "d"),
        "TH": ("hour", "h"), "TM": ("minute", "min"), "TS": ("second", "s"),
    }  # fmt: skip
    hours, minutes = parts.get("TH", 0), parts.get("TM", 0)
    if set(parts) == {"TH", "TM"} and minutes == 30 and hours < 20 and rng.random() < 0.6:
        return "an hour and a half" if hours == 1 else f"{rng.choice((UNITS[hours], str(hours)))} and a half hours"
    if set(parts) == {"TH", "TM"} and rng.random() < 0.2:
        return f"{hours}:{minutes:02} {rng.choice(('h', 'hours'))}"
    if set(parts) == {"TH", "TM"} and rng.random() < 0.2:
        return f"{hours}h{minutes:02}"
    if parts == {"TM": 30} and rng.random() < 0.4:
        return "half an hour"
    if parts == {"TM": 45} and rng.random() < 0.4:
        return "three quarters of an hour"
    style = rng.randrange(4)
    pieces = []
    for unit, n in parts.items():
        name, short = units[unit]
        plural = name if n == 1 else name + "s"
        if style == 0:
            one = "an" if name == "hour" else "a"
            pieces.append(f"{one if n == 1 and rng.random() < 0.5 else number_words(n)} {plural}")
        elif style == 1 and unit != "M":
            pieces.append(f"{n}{short}" if rng.random() < 0.5 else f"{n} {short}")
        else:
            pieces.append(f"{n} {plural}")
    if len(pieces) == 1:
        return pieces[0]
    joint = " " if style == 1 else rng.choice((" and ", " ", ", ")) if len(pieces) == 2 else ", "
    return joint.join(pieces)


def write_time(hour: int, minute: int, rng: Random) -> str:
    """The time on a 24-hour or 12-hour clock, in digits or in words with the part of the day."""
    style = rng.randrange(8)
    if hour in (0, 12) and minute == 0 and rng.random() < 0.5:
        return "midnight" if hour == 0 else "noon"
    if style == 0:
        return rng.choice((f"{hour:02}:{minute:02}", f"{hour}:{minute:02}"))
    if style == 1:
        return rng.choice(
            (f"{hour:02}{minute:02} hours", f"{hour:02}.{minute:02} hrs", f"{hour:02}:{minute:02} o'clock")
        )
    twelve = hour % 12 or 12
    if style in (2, 3, 4):
        suffix = rng.choice(("am", "a.m.", "AM")) if hour < 12 else rng.choice(("pm", "p.m.", "PM"))
        digits = f"{twelve}{rng.choice(':.')}{minute:02}" if minute or rng.random() < 0.4 else str(twelve)
        return f"{digits}{rng.choice(('', ' '))}{suffix}"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    if minute == 0:
        return f"{UNITS[twelve]} o'clock {part}"
    following = UNITS[twelve % 12 + 1]
    if minute == 30:
        return f"half past {UNITS[twelve]} {part}"
    distance = min(minute, 60 - minute)
    words = "a quarter" if distance == 15 else number_words(distance)
    if distance % 5:
        words += " minute" if distance == 1 else " minutes"
    return f"{words} past {UNITS[twelve]} {part}" if minute < 30 else f"{words} to {following} {part}"


def make_date(rng: Random) -> tuple[str, str]:
    """Any day from 1950 to 2049; recent years more often."""
    first, last = (1990, 2030) if rng.random() < 0.6 else (1950, 2049)
    start = datetime.date(first, 1, 1).toordinal()
    date = datetime.date.fromordinal(rng.randint(start, datetime.date(last, 12, 31).toordinal()))
    return write_date(date, rng), date.isoformat()


def make_money(rng: Random) -> tuple[str, str]:
    """Up to ten million, each length about equally often; yen have no cents."""
    currency = rng.choice(CURRENCIES)
    if rng.random() < 0.06:
        whole, cents = rng.randint(1, 199) * 100_000, 0
    else:
        whole = rng.randint(0, 10 ** rng.randint(1, 7) - 1)
        cents = rng.randint(1, 99) if rng.random() < 0.6 else 0
    if currency.code == "JPY":
        whole, cents = max(whole, 1), 0
    if whole == 0 and cents == 0:
        cents = rng.randint(1, 99)
    expected = f"{whole} JPY" if currency.code == "JPY" else f"{whole}.{cents:02} {currency.code}"
    return write_money(whole, cents, currency, rng), expected


def make_duration(rng: Random) -> tuple[str, str]:
    """One to three neighbouring units, kept as the text has them: 90 minutes are PT90M."""
    shapes = (
        ("TH", "TM"), ("TH", "TM"), ("TH", "TM"), ("TM", "TS"), ("D", "TH"), ("Y", "M"), ("W", "D"), ("D", "TH", "TM"),
        ("TH", "TM", "TS"), ("TH",), ("TM",), ("TS",), ("D",), ("W",), ("M",), ("Y",),
    )  # fmt: skip
    most = {"Y": 40, "M": 11, "W": 11, "D": 30, "TH": 47, "TM": 59, "TS": 59}
    shape = rng.choice(shapes)
    most = dict.fromkeys(most, 200) if len(shape) == 1 else most
    parts = {unit: rng.randint(1, most[unit]) for unit in shape}
    if shape == ("TH", "TM") and rng.random() < 0.2:
        parts["TM"] = rng.choice((15, 30, 45))
    if shape == ("TM",) and rng.random() < 0.4:
        parts["TM"] = rng.choice((15, 30, 45, 90))
    text = write_duration(parts, rng)
    date = "".join(f"{n}{unit}" for unit, n in parts.items() if unit[0] != "T")
    time = "".join(f"{n}{unit[1]}" for unit, n in parts.items() if unit[0] == "T")
    return text, f"P{date}" + (f"T{time}" if time else "")


def make_time(rng: Random) -> tuple[str, str]:
    """Any minute of the day; quarters more often."""
    hour = rng.randrange(24)
    minute = rng.choice((0, 15, 30, 45)) if rng.random() < 0.25 else rng.randrange(60)
    return write_time(hour, minute, rng), f"{hour:02}:{minute:02}"


MAKERS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "date": make_date,
    "money": make_money,
    "duration": make_duration,
    "time": make_time,
}

PHRASES: dict[str, tuple[str, ...]] = {
    "date": (
        "the invoice was issued on {}", "payment is due by {}", "the contract ends on {}", "she was born on {}",
        "the warranty runs until {}", "we signed the lease on {}", "your parcel was sent on {}",
        "he joined the team on {}", "the exam takes place on {}", "valid from {}", "last inspected {}",
        "date of birth: {}", "expires {}", "our flight leaves on {}", "the shop first opened on {}",
        "delivery expected {}", "the hearing is set for {}", "please reply before {}",
        "the museum has been closed since {}", "renewal date {}", "the letter is dated {}",
        "they got married on {}", "the software was released on {}", "first seen {}",
        "minutes of the meeting of {}", "{}: arrival of the second ship", "on {} the bridge was opened",
        "{} is the last day to apply",
    ),
    "money": (
        "the total comes to {}", "we paid {} for the repairs", "please transfer {} to our account",
        "the ticket costs {}", "amount due: {}", "the rent went up to {}", "a refund of {} is on its way",
        "the fine is {}", "he earns {}", "she sold the bike for {}", "the deposit was {}", "the budget is {}",
        "lunch was {}", "shipping: {}", "price {}", "the offer stands at {}", "you still owe me {}",
        "they raised {} for the school", "the damage is put at {}", "an annual fee of {} applies",
        "the cheapest room is {}", "balance {}", "we charge {}", "the bill says {}", "{} was taken from my card",
        "{} in total", "only {} left in the account", "he found {} in the old coat",
    ),
    "duration": (
        "the journey took {}", "bake it for {}", "the film lasts {}", "the meeting was over after {}",
        "we waited {}", "the battery lasts {}", "delivery takes {}", "the course runs for {}",
        "he has worked here for {}", "the guarantee covers {}", "let it rest for {}", "running time: {}",
        "the outage lasted {}", "notice period {}", "the surgery took {}", "she was away for {}",
        "the lease is for {}", "it rained for {}", "the fastest lap was {}", "cooking time {}",
        "the download needs {}", "they were married for {}", "charge the lamp for {}", "response within {}",
        "{} of walking and then the lake", "after {} the alarm went off", "{} later it was done", "elapsed {}",
    ),
    "time": (
        "the train leaves at {}", "we open at {}", "the call starts at {}", "dinner is at {}", "she woke up at {}",
        "doors close at {}", "the shop shuts at {}", "the alarm went off at {}", "check-in from {}", "boarding: {}",
        "the bus comes at {}", "his shift begins at {}", "the concert starts at {}", "be there by {}",
        "last entry {}", "the power failed at {}", "sunrise was at {}", "the vet can see you at {}",
        "the match kicks off at {}", "departure {}", "let us meet at {}", "the baby was born at {}",
        "the file was saved at {}", "next feeding at {}", "at {} the lights went out", "{} works for me",
        "{} sharp, please", "appointment at {}",
    ),
}  # fmt: skip

LEADS = (
    "", "", "", "", "", "", "as agreed, ", "note: ", "hello, ", "FYI ", "hi Anna, ", "dear Mr Okafor, ",
    "by the way, ", "re your mail: ", "order {ref}: ", "invoice no. {ref}, ", "ticket #{ref} - ", "(ref. {ref}) ",
    "we checked again: ", "just to confirm, ", "according to the file, ", "my sister says ",
    "sorry for the delay; ", "for room {room}: ", "good news! ", "update: ",
)  # fmt: skip
TAILS = (
    "", "", "", "", "", "", ", thanks", " as discussed", ", see order {ref}", " (file {ref})",
    ", if I remember rightly", ", no exceptions", "; call me if that is wrong", " according to the office",
    ", best regards, Ines", " for all {room} of us", ", as last year", ", said the driver", " - please confirm",
    ", which surprised nobody", ", signed J. Lindqvist", " at the latest",
)  # fmt: skip


def fill(pattern: str, rng: Random) -> str:
    """The pattern with made-up reference and room numbers: digits that are not the value."""
    return pattern.replace("{ref}", str(rng.randint(1000, 99999))).replace("{room}", str(rng.randint(2, 40)))


def sentence(kind: str, value: str, rng: Random) -> str:
    """The value in a phrase of its kind, between a lead and a tail; now and then alone, shouted or in small letters."""
    if rng.random() < 0.08:
        return value
    text = fill(rng.choice(LEADS), rng) + rng.choice(PHRASES[kind]).replace("{}", value) + fill(rng.choice(TAILS), rng)
    text = text[0].upper() + text[1:] if rng.random() < 0.85 else text
    text += rng.choice((".", ".", "", "!")) if not text.endswith(".") else ""
    draw = rng.random()
    return text.lower() if draw < 0.06 else text.upper() if draw < 0.14 else text


def make_row(rng: Random, kinds: Sequence[str] = KINDS, keep_held_out: bool = False) -> Row:
    """One row whose value belongs to the training side or, with `keep_held_out`, to the held-out side."""
    kind = rng.choice(kinds)
    while True:
        value, expected = MAKERS[kind](rng)
        if held_out(expected) == keep_held_out:
            return Row(sentence(kind, value, rng), kind, expected)
