"""The terminal chat. chat.py holds the conversation, view.py draws answers, editor.py reads lines, worker.py runs the
model.

Only `openm3.cli` imports this room; torch is imported on the model's thread, so that the prompt does not wait for it.
"""
