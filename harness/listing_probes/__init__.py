"""What is asked of a listing after it has run, or in place of one whose line breaks were lost.

Each file has `probe(names)`: `names` is what the listing defined, and the answer holds facts, plain
numbers and words, which `harness.listings` writes down. `as_wanted` says whether the listing does
what it set out to do. A probe that restates a listing of the article keeps to its arithmetic and
its calls, in lines of its own.
"""
