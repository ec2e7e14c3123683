//! The schedule: which layer on which micro-batch when, prefetch, overlap, journal.
