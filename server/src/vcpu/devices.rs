//! What is at a guest's ports, beside what KVM itself emulates.

use super::backend::Exit;

/// The devices of a machine, as one of its vCPUs reaches them.
pub(crate) trait Devices: Send {
    /// Reads from `port`; all ones where nothing is.
    fn read(&mut self, port: u16, data: &mut [u8]);

    /// Writes to `port`. Where that ends the guest, says how.
    fn write(&mut self, port: u16, data: &[u8]) -> Option<Exit>;

    /// Whether addresses without memory read as all ones and swallow writes, as on a PC. Else an access to them stops the vCPU.
    fn open_bus(&self) -> bool {
        false
    }
}
