//! Addresses for `batch`, as many at a time as one request may have: however many there are, they are never all in memory.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read as _},
    path::Path,
    slice,
};

use super::{exit::Failure, number};

/// As many addresses as one request may have.
pub(super) const MOST: usize = 1 << 18;
/// No number is longer, but for what stands in front of it or between its digits.
const LONGEST: usize = 1 << 10;

pub(super) enum Addresses<'a> {
    Given(slice::Chunks<'a, u64>),
    Words(Input),
    Text(Text),
}

impl<'a> Addresses<'a> {
    pub(super) fn given(addresses: &'a [u64]) -> Self {
        Self::Given(addresses.chunks(MOST))
    }

    /// Those of a file, `-` for standard input.
    pub(super) fn of(path: &Path, raw: bool) -> Result<Self, Failure> {
        let name = path.display().to_string();
        let (input, bytes): (Box<dyn BufRead>, _) = if name == "-" {
            (Box::new(BufReader::new(io::stdin())), None)
        } else {
            let file = File::open(path).map_err(|error| Failure::Usage(format!("{name}: {error}")))?;
            let bytes = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|data| data.len());
            (Box::new(BufReader::new(file)), bytes)
        };
        let input = Input { name, input, taken: 0, bytes };
        Ok(if raw { Self::Words(input) } else { Self::Text(Text::new(input)) })
    }

    /// The next ones; none behind the last.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u64>>, Failure> {
        let addresses = match self {
            Self::Given(pieces) => pieces.next().unwrap_or_default().to_vec(),
            Self::Words(input) => input.words()?,
            Self::Text(text) => text.addresses()?,
        };
        Ok((!addresses.is_empty()).then_some(addresses))
    }

    /// Hundredths of a file that have been read, if that is known.
    pub(super) fn percent(&self) -> Option<u64> {
        let (Self::Words(input) | Self::Text(Text { input, .. })) = self else { return None };
        input.taken.saturating_mul(100).checked_div(input.bytes?)
    }
}

/// A file, and how far it was read.
pub(super) struct Input {
    name: String,
    input: Box<dyn BufRead>,
    taken: u64,
    bytes: Option<u64>,
}

impl Input {
    fn problem(&self, what: impl std::fmt::Display) -> Failure {
        Failure::Usage(format!("{}: {what}", self.name))
    }

    fn words(&mut self) -> Result<Vec<u64>, Failure> {
        let mut bytes = Vec::new();
        let read = self.input.by_ref().take(8 * MOST as u64).read_to_end(&mut bytes);
        self.taken += read.map_err(|error| self.problem(error))? as u64;
        let (words, rest) = bytes.as_chunks();
        if !rest.is_empty() {
            return Err(self.problem(format!("{} bytes are not made of 8-byte words", self.taken)));
        }
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }
}

/// Numbers between blanks, with comments.
pub(super) struct Text {
    input: Input,
    word: Vec<u8>,
    line: u64,
    comment: bool,
}

impl Text {
    fn new(input: Input) -> Self {
        Self { input, word: Vec::new(), line: 1, comment: false }
    }

    fn addresses(&mut self) -> Result<Vec<u64>, Failure> {
        let mut addresses = Vec::new();
        while addresses.len() < MOST && self.find_word()? {
            let word = str::from_utf8(&self.word)
                .map_err(|_| self.problem("it is no text; --raw takes columns of 64-bit words"))?;
            let address = number::u64(word).map_err(|problem| self.problem(format!("{word}: {problem}")))?;
            addresses.push(address);
        }
        Ok(addresses)
    }

    fn problem(&self, what: impl std::fmt::Display) -> Failure {
        self.input.problem(format!("line {}: {what}", self.line))
    }

    /// Reads the next word, up to what ends it; says whether there is one.
    fn find_word(&mut self) -> Result<bool, Failure> {
        self.word.clear();
        loop {
            let bytes = match self.input.input.fill_buf() {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.input.problem(error)),
            };
            let (mut taken, mut ended) = (0, bytes.is_empty());
            for byte in bytes {
                let blank = byte.is_ascii_whitespace() || *byte == b'#' || self.comment;
                if blank && !self.word.is_empty() {
                    ended = true;
                    break;
                }
                taken += 1;
                match byte {
                    b'\n' => (self.line, self.comment) = (self.line + 1, false),
                    b'#' => self.comment = true,
                    byte if !blank => self.word.push(*byte),
                    _ => {}
                }
            }
            self.input.input.consume(taken);
            self.input.taken += taken as u64;
            if ended {
                return Ok(!self.word.is_empty());
            }
            if self.word.len() > LONGEST {
                return Err(self.problem("it is no number; write 0x and hex digits, or decimal digits"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(bytes: impl Into<Vec<u8>>) -> Input {
        let bytes = bytes.into();
        let size = Some(bytes.len() as u64);
        // Of few bytes at a time, so that words come in pieces.
        let input = BufReader::with_capacity(3, io::Cursor::new(bytes));
        Input { name: "file".into(), input: Box::new(input), taken: 0, bytes: size }
    }

    fn all(mut addresses: Addresses<'_>) -> Result<Vec<Vec<u64>>, String> {
        let mut pieces = Vec::new();
        loop {
            match addresses.next() {
                Ok(Some(piece)) => pieces.push(piece),
                Ok(None) => return Ok(pieces),
                Err(Failure::Usage(problem)) => return Err(problem),
                Err(other) => panic!("{other:?}"),
            }
        }
    }

    fn text(text: impl Into<Vec<u8>>) -> Result<Vec<Vec<u64>>, String> {
        all(Addresses::Text(Text::new(input(text))))
    }

    #[test]
    fn text_has_blanks_lines_and_comments() {
        assert_eq!(text("0x10 32\r\n\n# none\n 7 # one # more\n9#ten"), Ok(vec![vec![0x10, 32, 7, 9]]));
        assert_eq!(text(" \n#\n"), Ok(vec![]));
        for (bytes, expected) in [
            (&b"1\n2 x3\n"[..], "file: line 2: x3: "),
            (b"1\n\n\xff", "file: line 3: it is no text"),
            (&[b'1'; 2048], "file: line 1: it is no number"),
        ] {
            let problem = text(bytes).expect_err("no number");
            assert!(problem.starts_with(expected), "{problem}");
        }
    }

    #[test]
    fn more_than_one_request_takes_come_in_pieces() {
        let lengths = |pieces: Vec<Vec<u64>>| pieces.iter().map(Vec::len).collect::<Vec<_>>();
        let words = vec![7; 2 * MOST + 1];
        let bytes: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        let pieces = [
            all(Addresses::given(&words)),
            all(Addresses::Words(input(bytes))),
            text("7 ".repeat(words.len())),
        ];
        for pieces in pieces {
            assert_eq!(pieces.map(lengths), Ok(vec![MOST, MOST, 1]));
        }
    }

    #[test]
    fn how_far_a_file_was_read() {
        let mut addresses = Addresses::Words(input([0; 16]));
        assert_eq!(addresses.percent(), Some(0));
        assert!(matches!(addresses.next(), Ok(Some(_))));
        assert_eq!(addresses.percent(), Some(100));
        assert_eq!(Addresses::given(&[1]).percent(), None);
        let problem = all(Addresses::Words(input([0; 17]))).expect_err("a byte too many");
        assert_eq!(problem, "file: 17 bytes are not made of 8-byte words");
    }
}
