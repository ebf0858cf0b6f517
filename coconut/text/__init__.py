"""Tokenizers, chat templates, and answers in a text."""
