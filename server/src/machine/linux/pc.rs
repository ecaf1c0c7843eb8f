//! What a guest finds at its ports beside what KVM emulates: one serial line, and what resets the machine or
//! switches it off.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::console::{Console, Output};
use crate::vcpu::Exit;
use crate::vcpu::devices::Devices;

/// Interrupt line of the first serial port.
pub(super) const SERIAL_LINE: u32 = 4;
const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = SERIAL + 8;
pub(super) const KEYBOARD_COMMAND: u16 = 0x64;
/// The command by which the controller resets the CPU.
pub(super) const PULSE_RESET: u8 = 0xfe;
/// Registers of ACPI's fixed hardware. The first is there in name alone.
pub(super) const PM1_EVENTS: u16 = 0x600;
pub(super) const PM1_CONTROL: u16 = 0x604;
const SLEEP_ENABLE: u8 = 1 << (13 - 8);

/// The serial port, which all vCPUs reach.
pub(super) type SerialPort = Arc<Mutex<Serial<Interrupt, NoEvents, Output>>>;

/// Raises an interrupt line.
pub(super) struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A serial port, and the eventfd that it raises its line by.
pub(super) fn serial_port(output: Output) -> io::Result<(SerialPort, EventFd)> {
    let event = EventFd::new(EFD_NONBLOCK)?;
    let interrupt = Interrupt(event.try_clone()?);
    Ok((Arc::new(Mutex::new(Serial::new(interrupt, output))), event))
}

fn ended(how: &str) -> Exit {
    Exit::Shutdown(format!("the guest has {how}: detach and attach the machine to boot it again"))
}

/// The devices as one vCPU reaches them.
#[derive(Clone)]
pub(super) struct Pc {
    pub(super) serial: SerialPort,
    /// Ends with the last vCPU.
    pub(super) _console: Option<Arc<Console>>,
}

impl Devices for Pc {
    fn read(&mut self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL..SERIAL_END => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                data.fill_with(|| serial.read((port - SERIAL) as u8));
            }
            // The keyboard controller is ready for a command.
            KEYBOARD_COMMAND => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, port: u16, data: &[u8]) -> Option<Exit> {
        match port {
            SERIAL..SERIAL_END => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                for &byte in data {
                    // An interrupt that is pending already counts for this one too.
                    let _ = serial.write((port - SERIAL) as u8, byte);
                }
                None
            }
            KEYBOARD_COMMAND if data == [PULSE_RESET] => Some(ended("reset the machine")),
            // The only state that the tables offer to sleep in is the one to be off.
            PM1_CONTROL if matches!(data, [_, high, ..] if high & SLEEP_ENABLE != 0) => {
                Some(ended("switched the machine off"))
            }
            _ => None,
        }
    }

    fn open_bus(&self) -> bool {
        true
    }
}
