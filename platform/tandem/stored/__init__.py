"""Stored answers: responses and chat completions that clients asked to keep, with their requests, by tenant."""
