"""Units behind a number: their names, what they measure, and how they convert. Words alone; no sympy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A product of base quantities times a factor: "km/h" is 1000/3600 of (length 1, time -1)."""

    dimensions: tuple[tuple[str, int], ...]  # sorted by name, no zero powers; () is a plain number
    factor: Fraction  # of the base units: metre, second, gram, dollar, degree ...


# quantity: {names: factor}. Names are compared without case, except those of one or two letters.
_TABLE: Mapping[str, Mapping[str, Fraction | int]] = {
    "length": {
        "m meter metre meters metres": 1,
        "km kilometer kilometre kilometers kilometres": 1000,
        "cm centimeter centimetre centimeters centimetres 厘米": Fraction(1, 100),
        "dm decimeter decimetre decimeters decimetres": Fraction(1, 10),
        "mm millimeter millimetre millimeters millimetres 毫米": Fraction(1, 1000),
        "nm nanometer nanometre nanometers nanometres": Fraction(1, 10**9),
        "micron microns micrometer micrometers": Fraction(1, 10**6),
        "in inch inches": Fraction(254, 10_000),
        "ft foot feet": Fraction(3048, 10_000),
        "yd yard yards yds": Fraction(9144, 10_000),
        "mi mile miles": Fraction(1_609_344, 1000),
        "米": 1,
        "千米 公里": 1000,
    },
    "time": {
        "s sec secs second seconds 秒": 1,
        "ms millisecond milliseconds": Fraction(1, 1000),
        "min mins minute minutes 分钟": 60,
        "h hr hrs hour hours 小时": 3600,
        "day days 天": 86_400,
        "week weeks wk wks": 604_800,
    },
    "month": {"month months": 1, "year years yr yrs": 12},
    "mass": {
        "g gram grams gm gms": 1,
        "kg kilogram kilograms kgs 千克 公斤": 1000,
        "mg milligram milligrams": Fraction(1, 1000),
        "ton tons tonne tonnes": 10**6,
        "lb lbs pound pounds": Fraction(45_359_237, 100_000),
        "oz ounce ounces": Fraction(45_359_237, 1_600_000),
    },
    "money": {"dollar dollars usd": 1, "cent cents": Fraction(1, 100)},
    "euro": {"euro euros eur": 1},
    "sterling": {"gbp": 1},
    "yen": {"yen jpy": 1},
    "yuan": {"yuan rmb cny 元": 1},
    "rupee": {"rupee rupees": 1},
    "angle": {"degree degrees deg degs 度": 1, "arcminute arcminutes": Fraction(1, 60)},
    "radian": {"radian radians rad rads": 1},
    "temperature C": {"celsius": 1},
    "temperature F": {"fahrenheit": 1},
    "temperature K": {"kelvin kelvins K": 1},
    "force": {"N newton newtons": 1, "kN kilonewton kilonewtons": 1000},
    "energy": {"J joule joules": 1, "kJ kilojoule kilojoules": 1000},
    "calories": {"cal calorie calories": 1, "kcal": 1000},
    "electronvolt": {"eV": 1, "keV": 1000, "MeV": 10**6, "GeV": 10**9},
    "power": {"W watt watts": 1, "kW kilowatt kilowatts": 1000},
    "voltage": {"V volt volts": 1, "mV": Fraction(1, 1000)},
    "current": {"A amp amps ampere amperes": 1, "mA": Fraction(1, 1000)},
    "resistance": {"ohm ohms": 1},
    "frequency": {"Hz hertz": 1, "kHz": 1000, "MHz": 10**6},
    "pressure": {"Pa pascal pascals": 1, "kPa": 1000},
    "amount": {"mol mole moles": 1},
}
_COMPOUND = {
    "l liter liters litre litres L": (3, Fraction(1, 1000)),
    "ml mL milliliter milliliters millilitre millilitres 毫升": (3, Fraction(1, 10**6)),
    "升": (3, Fraction(1, 1000)),
    "cc": (3, Fraction(1, 10**6)),
    "gallon gallons gal": (3, Fraction(3_785_411_784, 10**12)),
    "acre acres": (2, Fraction(40_468_564_224, 10**7)),
    "hectare hectares ha": (2, Fraction(10_000)),
}


def _names() -> dict[str, Unit]:
    named: dict[str, Unit] = {}
    for quantity, units in _TABLE.items():
        for names, factor in units.items():
            for name in names.split():
                named[name] = Unit(dimensions=((quantity, 1),), factor=Fraction(factor))
    for names, (power, factor) in _COMPOUND.items():
        for name in names.split():
            named[name] = Unit(dimensions=(("length", power),), factor=factor)
    speed = {"mph": Fraction(1_609_344, 3_600_000), "kmh": Fraction(1000, 3600), "kph": Fraction(1000, 3600), "kmph": Fraction(1000, 3600)}
    for name, factor in speed.items():
        named[name] = Unit(dimensions=(("length", 1), ("time", -1)), factor=factor)
    return named


_NAMES = _names()
_WORD = re.compile(r"\s*([A-Za-zµ]+|[\u4e00-\u9fff]+)\.?")
_EXPONENT = re.compile(r"\s*\^\s*\{?\s*(-?[1-9])\s*\}?|([23])(?![0-9])")
_AFTER = {"squared": 2, "cubed": 3}
_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_JOINT = re.compile(r"\s*(/|per(?![A-Za-z])|\\cdot(?![A-Za-z])|\\times(?![A-Za-z])|\*|-(?=[A-Za-z]))\s*|\s+(?=[A-Za-z])")


def read_unit(text: str) -> tuple[Unit, str] | None:
    """The unit at the start of a text.

    Args:
        text: what stands behind a number, font commands removed: "cm^2", "square feet", "km/h on average".

    Returns:
        The unit and the rest of the text; None when the text starts with no unit.
    """
    dimensions: dict[str, int] = {}
    factor, at, sign = Fraction(1), 0, 1
    while True:
        found = _one_unit(text, at)
        if found is None:
            if at == 0:
                return None
            break
        unit, power, end = found
        for name, own_power in unit.dimensions:
            dimensions[name] = dimensions.get(name, 0) + sign * power * own_power
        factor *= unit.factor ** (sign * power)
        at = end
        joint = _JOINT.match(text, at)
        if joint is None or _one_unit(text, joint.end()) is None:
            break
        sign = -1 if joint[1] in ("/", "per") else 1
        at = joint.end()
    powers = tuple(sorted((name, power) for name, power in dimensions.items() if power))
    return Unit(dimensions=powers, factor=factor), text[at:].strip()


def _one_unit(text: str, at: int) -> tuple[Unit, int, int] | None:
    """One name with its power, and where it ends."""
    word = _WORD.match(text, at)
    if word is None:
        return None
    power = _BEFORE.get(word[1].lower())
    if power is not None:
        word = _WORD.match(text, word.end())
        if word is None:
            return None
    unit = _named(word[1])
    if unit is None:
        return None
    end = word.end() - (word[0].endswith(".") and not text[word.end() :].strip(" "))  # a full stop ends the sentence
    exponent = _EXPONENT.match(text, end)
    if exponent is not None:
        return unit, int(exponent[1] or exponent[2]), exponent.end()
    after = _WORD.match(text, end)
    if power is None and after is not None and after[1].lower() in _AFTER:
        return unit, _AFTER[after[1].lower()], after.end()
    return unit, power or 1, end


def _named(word: str) -> Unit | None:
    """ "CM" and "Meters" are known as "cm" and "meters"; "M", "Mg" and "mA" keep their case."""
    known = _NAMES.get(word)
    return (
        known
        if known is not None or (len(word) <= 2 and word.lower() not in ("cm", "km", "mm", "kg", "ml", "ft"))
        else _NAMES.get(word.lower())
    )
