"""The language of a text, by the small model of py3langid: pure NumPy, 67 microseconds a text, the same answer every time."""

from gadjax.errors import UserError

try:
    from py3langid import classify  # pyright: ignore[reportMissingImports]
except ImportError:
    classify = None

UNKNOWN = "und"  # as ISO 639 says it
FEWEST_LETTERS = 20  # below, a guess is worth little
INSTALLED = classify is not None


def check_installed(field: str) -> None:
    """Refuses a config that needs the detector where there is none."""
    if not INSTALLED:
        raise UserError(field, "needs the package py3langid", "pip install 'gadjax[languages]', or leave the field out")


def language(text: str) -> str:
    """The ISO 639-1 code of a text's language; `und` where it is too short to tell, or the detector is not installed."""
    if classify is None or sum(map(str.isalpha, text)) < FEWEST_LETTERS:
        return UNKNOWN
    return classify(text)[0]
