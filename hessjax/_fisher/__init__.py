"""The damped empirical Fisher: rows in, factors out; its inverse, and optimal brain surgeon on top of it."""
