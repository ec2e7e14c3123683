//! Text in, token batches out; what is observed of activations.
