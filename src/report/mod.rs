//! What people see: progress, health, tables, JSON.
