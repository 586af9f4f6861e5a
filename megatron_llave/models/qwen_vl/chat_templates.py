"""The prompts of the Qwen-VL families as Jinja templates: for apply_chat_template, and for sentence-transformers."""

import re
from collections.abc import Mapping

from megatron_llave.models.hf.sentence_transformers_files import PARTS, refuse_images
from megatron_llave.models.qwen_vl.prompt import Template

NO_IMAGES = (
    "in training the visual tokens had the positions of texts, and transformers gives them those of rows and columns; "
    "give texts alone, or embed images as the model card has it for transformers"
)
VISION_MARKS = "<|vision_start|>{}<|vision_end|>"
SENTENCE_ENDS = ".!?:;,\"')]}-\u3002\uff01\uff1f\uff1a\uff1b\uff0c\u2026\u201d\u2019\u300d\u300f\uff09"
"""With which an instruction may end; after other punctuation sentence-transformers gets a full stop more."""


def chat_template(template: Template, end: str) -> str:
    """Return a prompt as a Jinja template for apply_chat_template of transformers.

    A user's message alone is the whole input of an embedding, so what closes the prompt always follows it, with or
    without add_generation_prompt. Images come where the message has them; a system message takes the place of the
    template's own.

    Args:
        template: of the prompt.
        end: text of the tokenizer's end-of-sequence token.
    """
    marks = VISION_MARKS if template.is_chat else "{}"
    after = repr(template.after_images)
    pieces = (
        "{% set content = message['content'] %}"
        "{% set parts = [{'type': 'text', 'text': content}] if content is string else content %}"
        "{% for part in parts %}"
        f"{{% if part['type'] == 'image' %}}{{{{ {marks.format('<|image_pad|>')!r} }}}}"
        f"{{% elif part['type'] == 'video' %}}{{{{ {marks.format('<|video_pad|>')!r} }}}}"
        f"{{% else %}}{{{{ part['text']{'' if template.tail is not None else ' | trim'} }}}}{{% endif %}}"
        f"{{% if not loop.last and loop.nextitem.get('text', ' ') %}}{{{{ {after} }}}}{{% endif %}}"
        "{% endfor %}"
    )
    tail = repr(end if template.tail is None else template.tail)
    if not template.is_chat:
        return f"{{% for message in messages %}}{pieces}{{% endfor %}}{{{{ {tail} }}}}"
    turn = f"<|im_start|>system\n{template.system}<|im_end|>\n"
    system = f"{{% if loop.first and message['role'] != 'system' %}}{{{{ {turn!r} }}}}{{% endif %}}"
    return (
        f"{{% for message in messages %}}{'' if template.system is None else system}"
        f"{{{{ '<|im_start|>' + message['role'] + '\n' }}}}{pieces}"
        f"{{{{ {tail} if loop.last and message['role'] == 'user' else '<|im_end|>\n' }}}}"
        "{% endfor %}"
    )


def sentence_transformers_template(template: Template, end: str) -> str:
    """Return a prompt as the template of sentence-transformers: of its prompt, the images and the text of an input.

    A prompt is the system message if the template takes an instruction, and stands before the text if not. Images stand
    before both.

    Args:
        template: of the prompt.
        end: text of the tokenizer's end-of-sequence token.
    """
    marks = VISION_MARKS if template.is_chat else "{}"
    tail = end if template.tail is None else template.tail
    text = "ns.text" if template.takes_instruction else "ns.instruction + ns.text"
    trimmed = f"({text}) | trim" if template.tail is None else text
    lines = [PARTS, f"{{% set text = {trimmed} %}}"]
    if not template.has_image_positions:
        lines.append(refuse_images(0, NO_IMAGES))
    if template.is_chat and template.takes_instruction:
        lines.append(f"{{% set system = ns.instruction | trim or {template.system!r} %}}")
        if template.ends_instruction:
            stop = f"{{% if system[-1] not in {SENTENCE_ENDS!r} %}}{{% set system = system + '.' %}}{{% endif %}}"
            lines.append(stop)
        lines.append("{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}")
    elif template.is_chat and template.system is not None:
        lines.append(f"{{{{ {f'<|im_start|>system{chr(10)}{template.system}<|im_end|>{chr(10)}'!r} }}}}")
    if template.is_chat:
        lines.append("{{ '<|im_start|>user\n' }}")
    lines.append(
        "{% for kind in ns.images %}"
        f"{{{{ {marks.format('<|image_pad|>')!r} if kind == 'image' else {marks.format('<|video_pad|>')!r} }}}}"
        f"{{% if text or not loop.last %}}{{{{ {template.after_images!r} }}}}{{% endif %}}"
        "{% endfor %}"
    )
    return "".join([*lines, f"{{{{ text + {tail!r} }}}}"])


def prompt_of_template(text: str, prompts: Mapping[str, Template]) -> str | None:
    """Return the prompt that a chat template is that of, with any end-of-sequence token; None: of none of them."""
    unknown = "<|end|>"
    for name, template in prompts.items():
        pattern = re.escape(chat_template(template, unknown)).replace(re.escape(repr(unknown)), "'[^']*'")
        if re.fullmatch(pattern, text):
            return name
    return None
