//! Ranks, hosts and messages: the only room that calls MPI.
