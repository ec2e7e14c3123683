//! What a decoder layer is made of, and its forward pass over backend operations.
