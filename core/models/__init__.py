"""Where a model comes from and how it is loaded; the modelling code itself is Transformers'."""
