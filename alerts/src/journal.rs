//! What was told, to whom, and what was decided: one line of JSON each, only ever appended to.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::approval::utc;

/// Beyond this many bytes the journal becomes `journal.1.jsonl`, in place of an older one.
const TURNED_AT: u64 = 16 << 20;

/// A line. Fields that do not concern it are left out.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Line<'a> {
    /// Seconds since 1970.
    pub at: u64,
    /// The same for people.
    pub time: String,
    /// What happened: `queued`, `counted`, `told`, `failed`, `gave-up`, `lost`, `left`, `asked`, `decided`, `refused`.
    pub what: &'static str,
    /// The alarm's subject.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<&'a str>,
    /// The alarm's key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<&'a str>,
    /// Who was to be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipient: Option<&'a str>,
    /// Which question.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub question: Option<&'a str>,
    /// Who decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<&'a str>,
    /// Which way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub way: Option<String>,
    /// Why, or with which words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl<'a> Line<'a> {
    /// Something that happened now.
    pub fn new(at: u64, what: &'static str) -> Self {
        Self { at, time: utc(at), what, ..Self::default() }
    }
}

/// The file.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
}

impl Journal {
    /// In this directory.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// The file's path.
    pub fn path(&self) -> PathBuf {
        self.dir.join("journal.jsonl")
    }

    /// Append; on disk when it returns.
    pub fn append(&self, line: &Line<'_>) -> io::Result<()> {
        let path = self.path();
        if fs::metadata(&path).is_ok_and(|m| m.len() > TURNED_AT) {
            fs::rename(&path, self.dir.join("journal.1.jsonl"))?;
        }
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        crate::spool::give(&file, &self.dir)?;
        // One write: lines of several processes do not mix.
        file.write_all(&text)?;
        file.sync_data()
    }
}
