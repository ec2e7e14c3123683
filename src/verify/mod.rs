//! Proof of an output directory: the rules a loader relies on, and the distance to the source.
