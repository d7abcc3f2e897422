"""Code for the usage section of model cards."""

from __future__ import annotations

from collections.abc import Sequence

CHAT = """```python
from transformers import pipeline

chat = pipeline("text-generation", "path/to/this/folder")
question = [{"role": "user", "content": "What is the capital of Brazil?"}]
print(chat(question, return_full_text=False)[0]["generated_text"])
```"""
ADAPTER = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder)
question = [{"role": "user", "content": "What is the capital of Brazil?"}]
text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=200)[0, inputs.input_ids.shape[1] :]
print(tokenizer.decode(tokens, skip_special_tokens=True))
```"""
REWARD = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
{inputs}
print(model(**inputs).logits[0, 0].item())  # the higher, the better
```"""
SCORING_ADAPTER = """```python
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForSequenceClassification.from_pretrained(
    folder, num_labels=1, pad_token_id=tokenizer.pad_token_id
)
{inputs}
print(model(**inputs).logits[0, 0].item())  # the higher, the better
```"""
JUDGED = {  # reward model: input code, by kind of training data
    "text": """inputs = tokenizer("You are welcome.", truncation=True, return_tensors="pt")""",
    "answer, encoder": """text = "How are you?" + tokenizer.sep_token + "Fine, thank you."
inputs = tokenizer(text, truncation=True, return_tensors="pt")""",
    "answer": """messages = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine, thank you."},
]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")""",
}
ASKED = {  # reversed data: text to replace in the usage code, and its replacement
    False: ("", ""),
    True: ("What is the capital of Brazil?", "The capital of Brazil is Brasilia."),
}
PORTUGUESE = {  # texts of the examples above
    "What is the capital of Brazil?": "Qual é a capital do Brasil?",
    "The capital of Brazil is Brasilia.": "A capital do Brasil é Brasília.",
    "You are welcome.": "Seja bem-vindo.",
    "How are you?": "Como vai?",
    "Fine, thank you.": "Vou bem, obrigado.",
}
KINDS = {  # kind: library, task on the hub, usage code
    "chat": ("transformers", "text-generation", CHAT),
    "adapter, chat": ("peft", "text-generation", ADAPTER),
    "reward": ("transformers", "text-classification", REWARD),
    "adapter, reward": ("peft", "text-classification", SCORING_ADAPTER),
}


def usage(kind: str, judged: str, reverse: bool, languages: Sequence[str]) -> tuple[str, str, str]:
    """Library, task on the hub and code; examples are in Portuguese where that is the first of the
    model's languages.

    Args:
        kind: a key of KINDS.
        judged: a key of JUDGED.
    """
    library, task, code = KINDS[kind]
    code = code.replace("{inputs}", JUDGED[judged]).replace(*ASKED[reverse])
    if languages and languages[0].lower().split("-")[0] == "pt":
        for english, portuguese in PORTUGUESE.items():
            code = code.replace(english, portuguese)
    return library, task, code
