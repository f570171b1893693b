//! The fault matrix: from what is seen of a machine and its host to what is done.
//!
//! ```text
//!   Observation ──► Matrix::judge ──► (Row, Verdict)
//!      ▲                  ▲
//!   monitors        default rows (matrix.toml) + the policy's [[matrix]] rows
//! ```
//! A table of rows is read from the top; the first row that matches decides. Rows are text that administrators can read and
//! replace. What they may not say is in [`forbidden`]: above all, that a machine is started elsewhere before it is certain that
//! it does not run any more. Everything here is a function of values: no clock, no cluster.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The rows that count where the policy says nothing else, as users would write them.
pub const DEFAULT_TEXT: &str = include_str!("matrix.toml");

macro_rules! column {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum $name {
            $($(#[$value_doc])* #[serde(rename = $text)] $value,)+
        }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$value),+];

            /// As it stands in the table.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$value => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

column! {
    /// The management network, as Corosync's membership sees the node.
    Management {
        /// The node is a member.
        Up = "up",
        /// It is not, and did not leave by itself.
        Down = "down",
    }
}

column! {
    /// The production (business) network, as other nodes hear the node's heartbeats there.
    Production {
        /// Somebody hears it.
        Up = "up",
        /// Nobody hears it; others of its rack are heard.
        Node = "node",
        /// Nobody hears any node of its rack; other racks are heard.
        Rack = "rack",
        /// Nobody hears anybody.
        Everywhere = "everywhere",
    }
}

column! {
    /// The host's management controller, asked over its own network by the fencing device.
    Bmc {
        /// It says that the host has power.
        On = "on",
        /// It says that the host has none.
        Off = "off",
        /// It does not answer.
        Unreachable = "unreachable",
        /// It was not asked, or there is none.
        Unknown = "unknown",
    }
}

column! {
    /// The machine, as its VMM answers on its host.
    Machine {
        /// It runs, or is paused on purpose.
        Running = "running",
        /// Its VMM has ended without having been told to.
        Dead = "dead",
        /// Its VMM, or the monitor of its node, does not answer.
        Silent = "silent",
        /// Nothing has been heard of it.
        Unknown = "unknown",
    }
}

column! {
    /// The guest's own heartbeat.
    Guest {
        /// It answers.
        Up = "up",
        /// It was there and has stopped.
        Down = "down",
        /// It has none, or nothing can be said.
        Unwatched = "unwatched",
    }
}

column! {
    /// Whether what is wrong has been restarted on its node already (spec E-2: first the restart, then everything else).
    Restart {
        /// Not yet.
        Untried = "untried",
        /// As often as is configured, and it did not help.
        Failed = "failed",
    }
}

column! {
    /// What is done.
    Verdict {
        /// All is well.
        Nothing = "nothing",
        /// Somebody is told; nothing is touched, and who is not fenced yet is not fenced for this.
        Alarm = "alarm",
        /// Whatever does not answer (the VMM, the monitor) is restarted on its node.
        RestartAgent = "restart-agent",
        /// The machine is started again on its node.
        RestartMachine = "restart-machine",
        /// The machine leaves its node while it runs: live migration, or a hand-over to its standby.
        Move = "move",
        /// The machine is stopped by its node's own cluster software, and started elsewhere when that stop is confirmed.
        Relocate = "relocate",
        /// The host is fenced; when that is confirmed its machines are started elsewhere.
        FenceAndEvacuate = "fence-and-evacuate",
        /// The host is known to be without power: its machines are started elsewhere (Pacemaker confirms it by fencing as always).
        Evacuate = "evacuate",
        /// Nothing is started anywhere until an operator has looked. Somebody is told.
        Freeze = "freeze",
    }
}

impl Verdict {
    /// Whether the machine may run on another node afterwards.
    pub fn elsewhere(self) -> bool {
        matches!(self, Self::Move | Self::Relocate | Self::FenceAndEvacuate | Self::Evacuate)
    }

    /// Whether somebody has to be told.
    pub fn alarms(self) -> bool {
        self != Self::Nothing
    }
}

/// What is seen of one machine and its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Observation {
    /// See [`Management`].
    pub management: Management,
    /// See [`Production`].
    pub production: Production,
    /// See [`Bmc`].
    pub bmc: Bmc,
    /// See [`Machine`].
    pub machine: Machine,
    /// See [`Guest`].
    pub guest: Guest,
    /// See [`Restart`].
    pub restart: Restart,
}

impl Observation {
    /// Everything that can be seen, whether it can happen or not.
    pub fn all() -> impl Iterator<Item = Self> {
        let mut all = Vec::new();
        for &management in Management::ALL {
            for &production in Production::ALL {
                for &bmc in Bmc::ALL {
                    for &machine in Machine::ALL {
                        for &guest in Guest::ALL {
                            for &restart in Restart::ALL {
                                all.push(Self { management, production, bmc, machine, guest, restart });
                            }
                        }
                    }
                }
            }
        }
        all.into_iter()
    }
}

impl fmt::Display for Observation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { management, production, bmc, machine, guest, restart } = self;
        write!(
            f,
            "management {management}, production {production}, bmc {bmc}, machine {machine}, guest {guest}, restart {restart}"
        )
    }
}

/// One value of a column, several, or (left out) any.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Cell<T> {
    /// `bmc = "off"`
    One(T),
    /// `bmc = ["on", "unknown"]`
    Several(Vec<T>),
}

impl<T: Copy + PartialEq> Cell<T> {
    fn values(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Several(values) => values,
        }
    }
}

fn matches<T: Copy + PartialEq>(cell: &Option<Cell<T>>, value: T) -> bool {
    cell.as_ref().is_none_or(|cell| cell.values().contains(&value))
}

/// `[[matrix]]`: a row of the fault matrix. A row with the name of a default row stands in its place; any other is read before the
/// default rows.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Its name: what journal and alarms call it.
    pub name: String,
    /// The management network.
    pub management: Option<Cell<Management>>,
    /// The production network.
    pub production: Option<Cell<Production>>,
    /// The host's management controller.
    pub bmc: Option<Cell<Bmc>>,
    /// The machine.
    pub machine: Option<Cell<Machine>>,
    /// The guest's heartbeat.
    pub guest: Option<Cell<Guest>>,
    /// Whether a restart has been tried.
    pub restart: Option<Cell<Restart>>,
    /// What follows.
    pub verdict: Verdict,
    /// For people: why.
    #[serde(default)]
    pub why: String,
}

impl Row {
    /// Whether the row speaks of what is seen.
    pub fn matches(&self, o: &Observation) -> bool {
        matches(&self.management, o.management)
            && matches(&self.production, o.production)
            && matches(&self.bmc, o.bmc)
            && matches(&self.machine, o.machine)
            && matches(&self.guest, o.guest)
            && matches(&self.restart, o.restart)
    }

    /// The columns as text, `-` for any.
    pub fn cells(&self) -> [String; 6] {
        fn text<T: Copy + PartialEq + fmt::Display>(cell: &Option<Cell<T>>) -> String {
            match cell {
                None => "-".into(),
                Some(cell) => cell.values().iter().map(T::to_string).collect::<Vec<_>>().join("|"),
            }
        }
        [
            text(&self.management),
            text(&self.production),
            text(&self.bmc),
            text(&self.machine),
            text(&self.guest),
            text(&self.restart),
        ]
    }
}

/// Why `verdict` must not follow from what is seen, if it must not.
pub fn forbidden(o: &Observation, verdict: Verdict) -> Option<&'static str> {
    let lives = o.machine == Machine::Running || o.guest == Guest::Up;
    match verdict {
        Verdict::Nothing | Verdict::Alarm | Verdict::Freeze => None,
        Verdict::RestartAgent | Verdict::RestartMachine | Verdict::Relocate if o.management == Management::Down => {
            Some(
                "a node that is no member of the cluster restarts and stops nothing: say management = \"up\", or fence it",
            )
        }
        Verdict::RestartAgent | Verdict::RestartMachine | Verdict::Relocate => None,
        Verdict::Move if o.management == Management::Down => {
            Some("a machine leaves its node alive only if the node is a member of the cluster: say management = \"up\"")
        }
        Verdict::Move if o.machine != Machine::Running => {
            Some("only a machine that runs can be moved while it runs: say machine = \"running\", or relocate")
        }
        Verdict::Move => None,
        Verdict::FenceAndEvacuate if o.bmc == Bmc::Unreachable => Some(
            "where the BMC does not answer no fence is confirmed, and without that nothing is started elsewhere: say freeze",
        ),
        Verdict::FenceAndEvacuate => None,
        Verdict::Evacuate if o.bmc != Bmc::Off => Some(
            "only a host whose BMC says that it has no power is evacuated without being fenced: say bmc = \"off\", or \
             fence-and-evacuate",
        ),
        Verdict::Evacuate if o.management == Management::Up || o.production == Production::Up || lives => Some(
            "a host that is still heard, or whose machine is, has power whatever its BMC says: leave that out, or \
             fence-and-evacuate",
        ),
        Verdict::Evacuate => None,
    }
}

/// Rows in one line of TOML, as a parameter of an agent has them (without `why`).
pub fn line(rows: &[Row]) -> String {
    let row = |row: &Row| {
        let columns = ["management", "production", "bmc", "machine", "guest", "restart"];
        let mut text = format!("{{ name = '{}'", row.name);
        for (column, cell) in columns.iter().zip(row.cells()).filter(|(_, cell)| cell != "-") {
            let values: Vec<String> = cell.split('|').map(|value| format!("'{value}'")).collect();
            text.push_str(&format!(", {column} = [{}]", values.join(", ")));
        }
        text.push_str(&format!(", verdict = '{}' }}", row.verdict));
        text
    };
    format!("matrix = [{}]", rows.iter().map(row).collect::<Vec<_>>().join(", "))
}

/// Read the rows of [`line`]. The error says what is wrong with the text; whether the rows can be used is said by [`Matrix::with`].
pub fn read_rows(text: &str) -> Result<Vec<Row>, String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Rows {
        #[serde(default)]
        matrix: Vec<Row>,
    }
    let rows: Rows = toml::from_str(text).map_err(|e| e.message().trim().replace('\n', "; "))?;
    Ok(rows.matrix)
}

/// What is wrong with a row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("matrix row {name}: {why}")]
pub struct BadRow {
    /// Which of the given rows, from 0.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// A sentence.
    pub why: String,
}

/// The default rows cannot be read: this executable was built from a broken table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the default fault matrix is unreadable: {0}")]
pub struct BadDefault(String);

/// The table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrix {
    rows: Vec<(Row, bool)>,
}

#[derive(Deserialize)]
struct Table {
    matrix: Vec<Row>,
}

/// What is done where no row matches: the side on which nothing runs twice.
const OTHERWISE: Verdict = Verdict::Freeze;

impl Matrix {
    /// The default rows alone.
    pub fn standard() -> Result<Self, BadDefault> {
        let table: Table = toml::from_str(DEFAULT_TEXT).map_err(|e| BadDefault(e.to_string()))?;
        Ok(Self { rows: table.matrix.into_iter().map(|row| (row, false)).collect() })
    }

    /// The default rows with these of the policy among them, and what is wrong with the latter. A row with which something is
    /// wrong is left out.
    pub fn with(own: &[Row]) -> Result<(Self, Vec<BadRow>), BadDefault> {
        let mut matrix = Self::standard()?;
        let mut bad = Vec::new();
        let mut before = 0;
        for (index, row) in own.iter().enumerate() {
            let wrong = |why: String| BadRow { index, name: row.name.clone(), why };
            if let Some(why) = malformed(row, &own[..index]) {
                bad.push(wrong(why));
                continue;
            }
            match matrix.rows.iter().position(|(other, own)| !own && other.name == row.name) {
                Some(at) => matrix.rows[at] = (row.clone(), true),
                None => {
                    matrix.rows.insert(before, (row.clone(), true));
                    before += 1;
                }
            }
        }
        // Only the whole table says what a row decides.
        for (index, row) in own.iter().enumerate() {
            if bad.iter().any(|b| b.index == index) {
                continue;
            }
            let mut decides = Observation::all().filter(|o| matrix.row(o).is_some_and(|r| r == row)).peekable();
            if decides.peek().is_none() {
                let others: Vec<&str> = matrix
                    .rows
                    .iter()
                    .map(|(other, _)| other)
                    .take_while(|other| *other != row)
                    .filter(|other| Observation::all().any(|o| other.matches(&o) && row.matches(&o)))
                    .map(|other| other.name.as_str())
                    .collect();
                let why = format!("it never decides anything: {} before it match all that it does", others.join(", "));
                bad.push(BadRow { index, name: row.name.clone(), why });
                continue;
            }
            if let Some((o, why)) = decides.find_map(|o| Some((o, forbidden(&o, row.verdict)?))) {
                let why = format!("verdict {} is not possible with {o}: {why}", row.verdict);
                bad.push(BadRow { index, name: row.name.clone(), why });
            }
        }
        bad.sort_by_key(|b| b.index);
        if !bad.is_empty() {
            let good: Vec<Row> = own
                .iter()
                .enumerate()
                .filter(|(i, _)| bad.iter().all(|b| b.index != *i))
                .map(|(_, r)| r.clone())
                .collect();
            // Without them others may decide what they did not before: looked at again, until nothing is wrong.
            matrix = Self::with(&good)?.0;
        }
        Ok((matrix, bad))
    }

    /// The default rows with those of [`line`] among them. The error says what is wrong with the first bad one.
    pub fn read_line(text: &str) -> Result<Self, String> {
        let (matrix, bad) = Self::with(&read_rows(text)?).map_err(|e| e.to_string())?;
        bad.first().map_or(Ok(matrix), |bad| Err(bad.to_string()))
    }

    /// The rows from the top; `true` for those that are the policy's.
    pub fn rows(&self) -> impl Iterator<Item = (&Row, bool)> {
        self.rows.iter().map(|(row, own)| (row, *own))
    }

    /// The row that decides.
    pub fn row(&self, o: &Observation) -> Option<&Row> {
        self.rows.iter().map(|(row, _)| row).find(|row| row.matches(o))
    }

    /// What follows from what is seen.
    pub fn judge(&self, o: &Observation) -> Verdict {
        self.row(o).map_or(OTHERWISE, |row| row.verdict)
    }

    /// As a table for people. Rows of the policy are marked with `*`.
    pub fn table(&self) -> String {
        let head = ["row", "management", "production", "bmc", "machine", "guest", "restart", "verdict", "why"];
        let mut lines = vec![head.map(str::to_owned)];
        for (row, own) in self.rows() {
            let [a, b, c, d, e, f] = row.cells();
            let name = format!("{}{}", row.name, if own { " *" } else { "" });
            lines.push([name, a, b, c, d, e, f, row.verdict.to_string(), row.why.clone()]);
        }
        let mut widths = [0; 9];
        for line in &lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = cell.chars().count().max(*width);
            }
        }
        let mut text = String::new();
        for line in lines {
            let cells: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        }
        text
    }

    /// The same for programs: one object a row.
    pub fn list(&self) -> Vec<RowShown> {
        self.rows()
            .map(|(row, own)| {
                let [management, production, bmc, machine, guest, restart] = row.cells();
                RowShown {
                    name: row.name.clone(),
                    management,
                    production,
                    bmc,
                    machine,
                    guest,
                    restart,
                    verdict: row.verdict,
                    why: row.why.clone(),
                    of_the_policy: own,
                }
            })
            .collect()
    }
}

/// A row as JSON: alternatives separated by `|`, `-` for any.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RowShown {
    /// See [`Row`], as everything that follows.
    pub name: String,
    /// Management network.
    pub management: String,
    /// Production network.
    pub production: String,
    /// BMC.
    pub bmc: String,
    /// Machine.
    pub machine: String,
    /// Guest.
    pub guest: String,
    /// Restart.
    pub restart: String,
    /// What follows.
    pub verdict: Verdict,
    /// Why.
    pub why: String,
    /// The policy wrote it.
    pub of_the_policy: bool,
}

/// What is wrong with a row by itself.
fn malformed(row: &Row, earlier: &[Row]) -> Option<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if row.name.is_empty() || row.name.len() > 63 || !row.name.chars().all(good) {
        return Some(format!("the name {:?}: use 1 to 63 letters, digits and '-'", row.name));
    }
    if earlier.iter().any(|other| other.name == row.name) {
        return Some("there are two rows of this name".into());
    }
    if row.cells().iter().any(String::is_empty) {
        return Some("an empty list matches nothing: leave the column out for any value".into());
    }
    if row.why.contains(char::is_control) {
        return Some("why must be one line".into());
    }
    None
}

#[cfg(test)]
mod tests;
