"""Stand-ins for public chat templates, written anew from what each of them does with a conversation. IMAGE stands for an image."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
TEXTS = "{% for p in m.content %}{% if 'text' in p %}{{ p.text }}{% endif %}{% endfor %}"
IMAGES_FIRST = "{% for p in m.content | selectattr('type', 'equalto', 'image') %}IMAGE\n{% endfor %}"
TEXTS_AFTER = "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}"
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
IDEFICS = (
    "{% for m in messages %}{{ ROLE }}{{ ':' if m.content[0].type == 'image' else ': ' }}" + PARTS + "<end_of_utterance>\n{% endfor %}"
)
SPLIT_THOUGHT = (
    "{% set thought = '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
COLLECTED = "{% set said %}" + PARTS + "{% endset %}"
MARKS = (
    *("<s>", "</s>", "<end_of_turn>", "<start_of_turn>", "<end_of_utterance>", "[INST]", "[/INST]", "<|end|>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|turn_end|>", "<|answer_end|>", "[gMASK]", "<sop>"),
)
"""Special tokens that they write, beside ChatML's. <think> and </think> are tokens without being special."""


@dataclass(frozen=True)
class Stock:
    """A template, and what is known of it from reading it."""

    template: str
    end: str = "<|im_end|>"
    """The mark after an answer."""
    texts: tuple[str, ...] = ()
    """The roles whose content is one text."""
    refused: tuple[str, ...] = ()
    """Talks that it cannot write, or of which it leaves something out."""
    apart: bool = False
    """Whether an image at the edge of an answer changes how its text is written: the answer is then its text alone."""


NO_IMAGES = ("multi", "single", "system", "images", "unsupervised", "document", "thinking", "thinking_multi")
ALTERNATING = ("document", "document_text", "consecutive")

STOCKS = {
    "qwen2_vl": Stock("{% for m in messages %}<|im_start|>{{ m.role }}\n" + PARTS + "<|im_end|>\n{% endfor %}" + PROMPT),
    "qwen2_5_vl": Stock(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        + PARTS
        + "{% endif %}<|im_end|>\n{% endfor %}"
        + PROMPT
    ),
    "qwen3_vl": Stock(  # answers are texts
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% elif m.role == 'assistant' %}"
        + TEXTS
        + "{% else %}"
        + PARTS
        + "{% endif %}<|im_end|>\n{% endfor %}"
        + PROMPT,
        refused=("document",),
    ),
    "qwen3_5": Stock(  # thoughts only after the last question; the prompt opens one
        "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('No user query found') }}{% endif %}"
        + LAST_QUESTION
        + "{% for m in messages %}"
        + COLLECTED
        + "{% set said = said | trim %}{% if m.role == 'assistant' %}"
        + SPLIT_THOUGHT
        + "<|im_start|>assistant\n{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ said }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        refused=("document", "document_text"),
    ),
    "qwen3": Stock(  # text alone; the model opens its thoughts itself
        LAST_QUESTION
        + "{% for m in messages %}{% set said = m.content %}{% if m.role == 'assistant' %}"
        + SPLIT_THOUGHT
        + "{% if loop.index0 > ns.last and (loop.last or thought) %}<|im_start|>assistant\n<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
        "{{ said.lstrip('\n') }}{% else %}<|im_start|>assistant\n{{ said }}{% endif %}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ said }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT,
        texts=("system", "user", "assistant"),
        refused=NO_IMAGES,
    ),
    "internvl": Stock(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}IMAGE\n"
        "{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "llava_1_5": Stock(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper + ': ' }}{% endif %}"
        + IMAGES_FIRST
        + "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{% if m.role == 'assistant' %}{% generation %}{{ p.text + ' ' }}"
        "{% endgeneration %}{% else %}{{ p.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        end="",
        apart=True,
    ),
    "llava_next_mistral": Stock(  # reads the first part of an answer
        "{% for m in messages %}{% if m.role == 'system' %}<<SYS>>\n{{ m.content[0].text }}\n<</SYS>>\n\n{% elif m.role == 'user' %}[INST] "
        + IMAGES_FIRST
        + TEXTS_AFTER
        + " [/INST]{% else %}{{ ' ' + m.content[0].text + '</s> ' }}{% endif %}{% endfor %}",
        end="</s>",
        refused=("document", "two_parts"),
    ),
    "llava_next_vicuna": Stock(
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content[0].text }}{% elif m.role == 'user' %}{% if loop.first %}A chat "
        "between a curious human and an assistant. {% endif %}USER: "
        + IMAGES_FIRST
        + TEXTS_AFTER
        + "{% else %} ASSISTANT: "
        + TEXTS_AFTER
        + "</s>{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}",
        end="</s>",
        refused=("document",),
    ),
    "llava_onevision": Stock(
        "{% for m in messages %}<|im_start|>{{ m.role + ' ' }}"
        + IMAGES_FIRST
        + "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '\n' + p.text }}{% endgeneration %}{% else %}{{ '\n' + p.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        apart=True,
    ),
    "idefics3": Stock(IDEFICS.replace("ROLE", "m.role.capitalize()"), end="<end_of_utterance>", apart=True),
    "smolvlm": Stock("<|im_start|>" + IDEFICS.replace("ROLE", "m.role | capitalize"), end="<end_of_utterance>", apart=True),
    "gemma3": Stock(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set before = messages[0].content[0].text + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set before = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        + ALTERNATE
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ before if loop.first else '' }}"
        "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}IMAGE"
        "{% else %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        end="<end_of_turn>",
        refused=ALTERNATING,
    ),
    "pixtral": Stock(  # lists from the user, texts from the others; the system's words go before the last question
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set told = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set told = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        + ALTERNATE
        + "{% if m.role == 'user' %}[INST]{{ told if loop.index0 >= rest | length - 2 else '' }}"
        + PARTS
        + "[/INST]{% else %}{{ m.content + eos_mark }}{% endif %}{% endfor %}".replace("eos_mark", "'</s>'"),
        end="</s>",
        texts=("system", "assistant"),
        refused=ALTERNATING,
    ),
    "glm4_5v": Stock(  # no end mark; every answer opens with a thought, if an empty one
        "[gMASK]<sop>"
        + LAST_QUESTION
        + "{% for m in messages %}"
        + COLLECTED
        + "{% if m.role == 'assistant' %}"
        + SPLIT_THOUGHT
        + "<|assistant|>\n{{ '<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' }}"
        "{{ '\n' + said.strip() if said.strip() else '' }}{% else %}{{ '<|' + m.role + '|>\n' + said }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        end="",
        refused=("empty", "blank"),
    ),
    "lfm2_vl": Stock(
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        + PARTS
        + "{% endif %}<|im_end|>\n{% endfor %}"
        + PROMPT
    ),
    "lfm2_5_vl": Stock(  # says itself what is generated
        LAST_QUESTION
        + "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        + COLLECTED
        + "{% if m.role == 'assistant' %}{% generation %}{% if loop.index0 <= ns.last and '</think>' in said %}"
        "{% set said = said.split('</think>')[-1] | trim %}{% endif %}{{ said }}<|im_end|>\n{% endgeneration %}{% else %}"
        "{{ said }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
    ),
    "lfm2": Stock(  # writes as JSON what is no text
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set said = m.content if m.content is string else m.content | tojson %}"
        "{{ said + '<|im_end|>\n' }}{% endfor %}" + PROMPT,
        texts=("system", "user", "assistant"),
        refused=NO_IMAGES,
    ),
    "phi4_multimodal": Stock(
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        + PARTS
        + "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        end="<|end|>",
    ),
    "phi3": Stock(  # one more mark after the last turn
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        end="<|end|>",
        texts=("system", "user", "assistant"),
        refused=NO_IMAGES,
    ),
    "chatml": Stock(CHATML + PROMPT, texts=("system", "user", "assistant"), refused=NO_IMAGES),
    "llama3": Stock(
        "{% for m in messages %}{{ bos_token if loop.first else '' }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        end="<|eot_id|>",
        texts=("system", "user", "assistant"),
        refused=NO_IMAGES,
    ),
    "llama3_first": Stock(  # writes the prompt of a next answer whether asked or not
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        texts=("system", "user", "assistant"),
        refused=NO_IMAGES,
    ),
    "mistral": Stock(
        "{{ bos_token }}{% for m in messages %}"
        + ALTERNATE
        + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
        end="</s>",
        texts=("system", "user", "assistant"),
        refused=(*NO_IMAGES, *ALTERNATING, "system_text"),
    ),
    "cohere2": Stock(  # two marks after every turn's text
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}{% if m.role == 'assistant' %}<|answer_end|>{% endif %}"
        "<|turn_end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        end="<|answer_end|><|turn_end|>",
        texts=("system", "user", "assistant"),
        refused=NO_IMAGES,
    ),
    "deepseek_distill": Stock(  # never shows a thought again
        "{{ bos_token }}{% for m in messages %}{% set said = m.content %}{% if m.role == 'assistant' %}{% if '</think>' in said %}"
        "{% set said = said.split('</think>')[-1] %}{% endif %}{{ '<|assistant|>' + said + '</s>' }}{% else %}{{ '<|user|>' + said }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        end="</s>",
        texts=("system", "user", "assistant"),
        refused=NO_IMAGES,
    ),
    "merging": Stock(  # answers that follow each other are one turn of the model, as in Gemma 4
        "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}<start_of_turn>{{ m.role }}\n{% endif %}"
        + PARTS
        + "{% if loop.last or messages[loop.index0 + 1].role != m.role %}<end_of_turn>\n{% endif %}{% endfor %}",
        end="<end_of_turn>",
    ),
}
