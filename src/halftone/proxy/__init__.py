"""The proxy card: is what each published method addresses present in this model?

A method can only be judged on a model that has the trouble it cures. Each phenomenon gets figures, thresholds
that were set before anything was measured, and a verdict; where it is absent, the method's claim cannot be
tested on the model.
"""
