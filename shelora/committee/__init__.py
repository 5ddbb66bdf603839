"""The committee of a round's clients that opens the sum of its updates, and nothing but that sum (docs/committee.md).

Servers use `context`, `rules`, `statements`, `dealing`, `certificate` and `verdict`: they relay, count and sign
nothing. Agents use `keys`, `dealer`, `member` and `reader` besides: what holds secrets or opens shares is in these and
in what they import, and no server imports them.
"""
