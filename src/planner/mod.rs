//! Who owns which layers: pure arithmetic over reported machines.
