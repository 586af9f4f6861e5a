"""The texts that go with images and queries. A model finds best with those that it was trained with."""

from dataclasses import dataclass

from megatron_llave.batch import Side
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.errors import ConfigError, DataError


@dataclass(frozen=True)
class Prompts:
    """The texts of an index; those of queries hold {}, where the user's text goes."""

    image: str
    """With each image of the index."""
    text: str
    """Query of a text."""
    like: str
    """Query of an image alone."""
    both: str
    """Query of an image and a text."""

    def query(self, text: str, image: bytes | None) -> Side:
        """Return the model's input for a query.

        Raises:
            ConfigError: there is neither text nor image.
        """
        text = text.strip()
        if not text and image is None:
            raise ConfigError("a query needs a text, an image, or both")
        # What looks like a placeholder in the user's text is ordinary text.
        written = mark_user_text(text, 0)
        if image is None:
            return Side(mark_user_text(self.text, 0).replace("{}", written), [])
        prompt = mark_user_text(self.both if text else self.like, 1)
        return Side(prompt.replace("{}", written), [image])


MMEB = Prompts(
    "<image>\nRepresent the given image.",
    "Find me an everyday image that matches the given caption: {}",
    "<image>\nFind a day-to-day image that looks similar to the provided image.",
    "<image>\nGiven an image, find a similar everyday image with the described changes: {}",
)
"""Those of MMEB, with which LLaVE and VLM2Vec were trained."""
INSTRUCT = Prompts(
    "",
    "Instruct: Find an image that matches the given text.\n{}",
    "Instruct: Find an image similar to the given image.\n<image>",
    "Instruct: Find an image similar to the given image with the described changes.\n<image>{}",
)
"""In the form of GME and Qwen3-VL-Embedding, whose instruction goes into the system message."""
CAPTIONS = Prompts("Represent the given image.", "{}", "Represent the given image.", "{}")
"""Those of `llave prepare folder` and of every text as it is."""
BY_TEMPLATE = {"qwen": MMEB, "vlm2vec_v2": MMEB, "gme": INSTRUCT, "qwen3_vl_embedding": INSTRUCT}


def default_prompts(template: str) -> Prompts:
    """Return the prompts of models with this template (data.prompt)."""
    return BY_TEMPLATE.get(template, CAPTIONS)


def require_places(option: str, prompt: str) -> None:
    """Raise a ConfigError unless a prompt says where the user's text goes, and has one place for an image at most."""
    if option in ("--text-prompt", "--both-prompt") and prompt.count("{}") != 1:
        raise ConfigError(f"{option} {prompt!r} must hold {{}} once, where the text of the query goes")
    if option != "--text-prompt":
        try:
            mark_user_text(prompt, 1)
        except DataError as error:
            raise ConfigError(f"{option}: {error}") from error
