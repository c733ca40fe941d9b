"""What a text must be to be worked on: real letters, and not endless."""


def check_text(text: object, socket: str, longest: int) -> str:
    """The text. Raises ValueError, naming `socket`, if it is none, has more letters than `longest` or half characters."""
    if not isinstance(text, str):
        raise ValueError(f"{socket}: {text!r:.40} is not a text. Connect a node that writes text.")
    if len(text) > longest:
        raise ValueError(f"{socket}: it has {len(text)} letters, at most {longest} are of use. Shorten it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{socket}: letter {error.start + 1} is half a character, as a cut through an emoji leaves it. Type it again."
        ) from error
    return text
