//! Files that a person wrote for the daemon: its configuration, certificates and keys.

use std::io::{self, Read as _};
use std::path::Path;

use crate::machine::regular_file;

/// Largest file that is read: each of these is a page or two.
const MOST: u64 = 1 << 20;

/// All of a file. A pipe or a device would be read without end.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    regular_file(path)?.take(MOST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST {
        return Err(io::Error::other("it is larger than 1 MiB: is it the right file?"));
    }
    Ok(bytes)
}
