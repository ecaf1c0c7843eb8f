//! The pagewalk daemon.
