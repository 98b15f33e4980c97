"""Requests made of a document, thousands of them, and answers held against it: by schemathesis, from outside."""
