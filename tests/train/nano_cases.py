"""What a case of the recipe says: the texts of its turns."""


def answers(case):
    return [m["content"] for m in case.messages if m["role"] == "assistant"]


def questions(case):
    texts = (m["content"] for m in case.messages if m["role"] == "user")
    return [t if isinstance(t, str) else "".join(p.get("text", "") for p in t).strip() for t in texts]
