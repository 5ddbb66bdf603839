"""The scheme once more, in Python's integers and as the textbook writes it: what numpy's results are held against."""

from fractions import Fraction


def negacyclic(a, s):
    """The product modulo X^N + 1, schoolbook, unbounded integers."""
    degree = len(a)
    product = [0] * degree
    for i, x in enumerate(a):
        for j, y in enumerate(s):
            place = i + j
            product[place % degree] += x * y if place < degree else -x * y
    return product


def kept(coefficient, parameters):
    """The upper bits of a coefficient, rounded half up, as they travel."""
    half = (1 << parameters.dropped_bits) >> 1
    return ((coefficient + half) % parameters.modulus) >> parameters.dropped_bits


def centred(value, modulus):
    value %= modulus
    return value - modulus if value >= modulus // 2 else value


def opened(total, product, parameters, contributors, scale):
    """The value of one coefficient of a sum, as an exact fraction."""
    plain = Fraction(centred((total << parameters.dropped_bits) - product, parameters.modulus))
    if parameters.dropped_bits:
        plain -= Fraction(contributors, 2)
    return plain / scale
