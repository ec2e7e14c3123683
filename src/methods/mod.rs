//! How codes and scales are chosen.
