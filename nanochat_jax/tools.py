"""The tool that an assistant may call: a calculator that evaluates a whitelist, exactly, and never runs code.

Arithmetic is done in fractions, so 0.1 + 0.2 is 0.3. There is neither eval nor a signal in it: every step is bounded
in size beforehand, so that it may run in any thread and ends in well under a millisecond.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_LENGTH = 256  # characters of an expression
MAX_DEPTH = 32  # of nesting
MAX_BITS = 256  # of numerator and denominator of every value on the way
MAX_EXPONENT = 256
DECIMALS = 10

# Python's parser sees only what is made of these: numbers, operators, quoted text without escapes, .count.
_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?(?![\w.])|\.[0-9]+(?![\w.])"
_EXPRESSION = re.compile(rf"(?:{_NUMBER}|[-+*/%() ]|'[^'\\\n\r\0]*'|\"[^\"\\\n\r\0]*\"|(?<=['\"])\.count(?=\())+")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str | None:
    """The value of an arithmetic expression, or of `"text".count("t")`, as text.

    Whole numbers come out as such (48/2 is 24), others rounded to ten decimal places, half to even, without trailing
    zeros. Commas between thousands are taken out of numbers.

    Returns:
        The result; None for whatever is not understood, too large, or has no value. As in nanochat, no output follows
        a call that fails.
    """
    expression = expression.strip()
    if len(expression) > MAX_LENGTH:
        return None
    if "'" not in expression and '"' not in expression:
        expression = _THOUSANDS.sub("", expression)
    if not _EXPRESSION.fullmatch(expression):
        return None
    try:
        return _format(_evaluate(ast.parse(expression, mode="eval").body, 0))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr, depth: int) -> Fraction:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=int() | float() as value):
            return _bounded(Fraction(str(value)))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_evaluate(operand, depth + 1))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_evaluate(left, depth + 1), _evaluate(right, depth + 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(Fraction(_BINARY[type(op)](_evaluate(left, depth + 1), _evaluate(right, depth + 1))))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return Fraction(text.count(part))
    raise ValueError("not on the whitelist")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > MAX_EXPONENT or (exponent.denominator == 1 and bits * abs(exponent) > 2 * MAX_BITS):
        raise ValueError("too large")
    power = base**exponent  # a float for a root
    if isinstance(power, complex):
        raise ValueError("not a real number")
    return _bounded(Fraction(str(power)) if isinstance(power, float) else power)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("too large")
    return value


def _format(value: Fraction) -> str:
    scaled = round(value * 10**DECIMALS)
    whole, rest = divmod(abs(scaled), 10**DECIMALS)
    decimals = f".{rest:0{DECIMALS}}".rstrip("0").rstrip(".")
    return f"{'-' if scaled < 0 else ''}{whole}{decimals}"
