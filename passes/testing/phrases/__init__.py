"""The phrases that random models are made of, by subject; `registry` lists all of them.

A phrase is a function of a `Writer` that writes the left side of a rule, or what the rule must refuse: it takes values, writes
statements, and gives its results. What makes rules refuse (a second user, an in-place write, a shared module, a broadcast sum)
is drawn now and then, the plain case mostly.
"""
