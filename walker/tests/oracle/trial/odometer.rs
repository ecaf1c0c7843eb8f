//! A counter with a wheel for each thing that varies.
//!
//! Every tuple has a number. A run visits all of them, or as many as were asked for, in steps that are coprime to the number of
//! tuples: no tuple comes twice, and the wheels that are read first run through all their combinations in exactly as many tuples
//! as those are. Steps near the golden section spread the readings of the other wheels evenly.

pub(crate) struct Odometer {
    wheels: Vec<u64>,
    tuples: u64,
    start: u64,
    step: u64,
}

impl Odometer {
    pub(crate) fn new(wheels: &[u64], start: u64) -> Odometer {
        let tuples = wheels.iter().product();
        let mut step = (tuples as f64 * 0.618_033_988_749) as u64 | 1;
        while common_divisor(step, tuples) != 1 {
            step += 1;
        }
        Odometer { wheels: wheels.to_vec(), tuples, start: start % tuples, step }
    }

    pub(crate) fn tuples(&self) -> u64 {
        self.tuples
    }

    /// Reads the wheels of the `n`th tuple of this run.
    pub(crate) fn read(&self, n: u64, reading: &mut Reading) {
        let mut rest = ((u128::from(n) * u128::from(self.step) + u128::from(self.start))
            % u128::from(self.tuples)) as u64;
        reading.digits.clear();
        reading.next = 0;
        for wheel in &self.wheels {
            reading.digits.push(rest % wheel);
            rest /= wheel;
        }
    }
}

/// The digits of one tuple, taken one after the other.
#[derive(Default)]
pub(crate) struct Reading {
    digits: Vec<u64>,
    next: usize,
}

impl Reading {
    pub(crate) fn take(&mut self) -> u64 {
        let digit = self.digits[self.next];
        self.next += 1;
        digit
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.take() == 1
    }
}

fn common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}
