//! A client for the pagewalk daemon.
