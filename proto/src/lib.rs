//! The gRPC contract of pagewalk.
