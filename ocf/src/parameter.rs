//! Parameters, declared once: parsing, validation and metadata all come from the declaration.
//!
//! A [`Param<T>`] is a `static` of the agent; reading it through [`Parameters::get`] gives a `T`. A value is looked at when it
//! is asked for: `stop` must work with the one parameter that it needs even when another one is nonsense.

use std::marker::PhantomData;
use std::time::Duration;

use crate::environment::Environment;
use crate::exit::{Failure, Result};

/// What a parameter's value may be.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Any text.
    Text,
    /// A decimal number in this range, both ends included.
    Integer {
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// `true`/`yes`/`on`/`1` or `false`/`no`/`off`/`0`.
    Boolean,
    /// A span of time: a number with `ms`, `s`, `m`/`min`, `h`, or without a unit (seconds).
    Time,
    /// One of these words.
    Choice(&'static [&'static str]),
}

impl Kind {
    /// `type` of the metadata's `<content>`. (`select` is in the standard, but not in the DTD that `ocf-tester` uses.)
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text | Self::Choice(_) => "string",
            Self::Integer { .. } => "integer",
            Self::Boolean => "boolean",
            Self::Time => "time",
        }
    }
}

/// A check beyond the kind: `Err` is the rest of the sentence "parameter x ...".
pub type Check = fn(&str) -> std::result::Result<(), String>;

/// Everything that is to be known about a parameter.
#[derive(Debug, Clone, Copy)]
pub struct Declaration {
    /// Name, as in the configuration.
    pub name: &'static str,
    /// What its value may be.
    pub kind: Kind,
    /// Value when it is not set.
    pub default: Option<&'static str>,
    /// Must be set.
    pub required: bool,
    /// The combination of all parameters in one group is unique among resources of this type.
    pub unique_group: Option<&'static str>,
    /// May change while the resource runs (needs `reload-agent`).
    pub reloadable: bool,
    /// Headline.
    pub short: &'static str,
    /// The whole story: what it does, its unit, what happens when it is wrong.
    pub long: &'static str,
    /// A further check.
    pub check: Option<Check>,
}

impl Declaration {
    /// Why `raw` is no value for this parameter, if it is none.
    fn fault(&self, raw: &str) -> Option<String> {
        let kind_fault = match self.kind {
            Kind::Text => None,
            Kind::Integer { .. } => u64::parse(self, raw).err(),
            Kind::Boolean => bool::parse(self, raw).err(),
            Kind::Time => Duration::parse(self, raw).err(),
            Kind::Choice(words) => {
                (!words.contains(&raw)).then(|| format!("is \"{raw}\", which is not one of {}", words.join(", ")))
            }
        };
        kind_fault.or_else(|| self.check.and_then(|check| check(raw).err()))
    }
}

/// A type that a parameter's text can be read as.
pub trait Value: Sized {
    /// Read `raw`; the error is the rest of the sentence "parameter x ...".
    fn parse(declaration: &Declaration, raw: &str) -> std::result::Result<Self, String>;
}

impl Value for String {
    fn parse(_: &Declaration, raw: &str) -> std::result::Result<Self, String> {
        Ok(raw.to_owned())
    }
}

impl Value for u64 {
    fn parse(declaration: &Declaration, raw: &str) -> std::result::Result<Self, String> {
        let number: u64 = raw.trim().parse().map_err(|_| format!("is \"{raw}\", which is not a whole number"))?;
        match declaration.kind {
            Kind::Integer { min, max } if !(min..=max).contains(&number) => {
                Err(format!("is {number}, which is not between {min} and {max}"))
            }
            _ => Ok(number),
        }
    }
}

impl Value for bool {
    fn parse(_: &Declaration, raw: &str) -> std::result::Result<Self, String> {
        match raw.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "1" | "y" => Ok(true),
            "false" | "no" | "off" | "0" | "n" => Ok(false),
            _ => Err(format!("is \"{raw}\", which is neither true nor false")),
        }
    }
}

impl Value for Duration {
    fn parse(_: &Declaration, raw: &str) -> std::result::Result<Self, String> {
        parse_time(raw).ok_or_else(|| format!("is \"{raw}\", which is not a time such as 500ms, 10s or 2min"))
    }
}

/// Pacemaker's notation of time: a whole number and `ms`, `s`, `m`, `min`, `h`, or nothing for seconds.
pub fn parse_time(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..digits].parse().ok()?;
    let milliseconds = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "ms" | "msec" => 1,
        "" | "s" | "sec" => 1000,
        "m" | "min" => 60_000,
        "h" | "hr" => 3_600_000,
        _ => return None,
    };
    Some(Duration::from_millis(number.checked_mul(milliseconds)?))
}

/// A declared parameter whose value is a `T`.
#[derive(Debug)]
pub struct Param<T> {
    declaration: Declaration,
    value: PhantomData<fn() -> T>,
}

impl<T> Param<T> {
    const fn of(name: &'static str, kind: Kind) -> Self {
        let declaration = Declaration {
            name,
            kind,
            default: None,
            required: false,
            unique_group: None,
            reloadable: false,
            short: "",
            long: "",
            check: None,
        };
        Self { declaration, value: PhantomData }
    }

    /// The declaration, for [`crate::Description::parameters`].
    pub const fn declaration(&self) -> &Declaration {
        &self.declaration
    }
    /// Must be set.
    #[must_use]
    pub const fn required(mut self) -> Self {
        self.declaration.required = true;
        self
    }
    /// Has this value when it is not set. It must be a valid one (the tests of an agent find out with [`Parameters::validate`]).
    #[must_use]
    pub const fn default(mut self, value: &'static str) -> Self {
        self.declaration.default = Some(value);
        self
    }
    /// See [`Declaration::unique_group`].
    #[must_use]
    pub const fn unique_group(mut self, group: &'static str) -> Self {
        self.declaration.unique_group = Some(group);
        self
    }
    /// See [`Declaration::reloadable`].
    #[must_use]
    pub const fn reloadable(mut self) -> Self {
        self.declaration.reloadable = true;
        self
    }
    /// Headline.
    #[must_use]
    pub const fn short(mut self, text: &'static str) -> Self {
        self.declaration.short = text;
        self
    }
    /// Whole story.
    #[must_use]
    pub const fn long(mut self, text: &'static str) -> Self {
        self.declaration.long = text;
        self
    }
    /// A further check.
    #[must_use]
    pub const fn check(mut self, check: Check) -> Self {
        self.declaration.check = Some(check);
        self
    }
}

impl Param<String> {
    /// Any text.
    pub const fn text(name: &'static str) -> Self {
        Self::of(name, Kind::Text)
    }
    /// One of `words`.
    pub const fn choice(name: &'static str, words: &'static [&'static str]) -> Self {
        Self::of(name, Kind::Choice(words))
    }
}

impl Param<u64> {
    /// A whole number from `min` to `max`.
    pub const fn integer(name: &'static str, min: u64, max: u64) -> Self {
        Self::of(name, Kind::Integer { min, max })
    }
}

impl Param<bool> {
    /// True or false.
    pub const fn boolean(name: &'static str) -> Self {
        Self::of(name, Kind::Boolean)
    }
}

impl Param<Duration> {
    /// A span of time.
    pub const fn time(name: &'static str) -> Self {
        Self::of(name, Kind::Time)
    }
}

/// The parameters of one call.
#[derive(Debug, Clone)]
pub struct Parameters {
    environment: Environment,
}

impl Parameters {
    /// Those in `environment`.
    pub fn new(environment: Environment) -> Self {
        Self { environment }
    }

    /// Value of a parameter that is required or has a default. Fails with `Configured` when it is missing or wrong.
    pub fn get<T: Value>(&self, parameter: &Param<T>) -> Result<T> {
        let name = parameter.declaration.name;
        self.find(parameter)?
            .ok_or_else(|| Failure::configured(format!("parameter {name} is not set; it has no default")))
    }

    /// Value of a parameter, or `None` if it is not set and has no default. Fails with `Configured` when it is wrong.
    pub fn find<T: Value>(&self, parameter: &Param<T>) -> Result<Option<T>> {
        let declaration = &parameter.declaration;
        let Some(raw) = self.environment.parameter(declaration.name).or(declaration.default) else {
            return Ok(None);
        };
        if let Some(fault) = declaration.fault(raw) {
            return Err(wrong(declaration, &fault));
        }
        T::parse(declaration, raw).map(Some).map_err(|fault| wrong(declaration, &fault))
    }

    /// Whether the configuration sets this parameter.
    pub fn is_set<T>(&self, parameter: &Param<T>) -> bool {
        self.environment.parameter(parameter.declaration.name).is_some()
    }

    /// Check every declared parameter: level 0 of `validate-all`. Reports all faults at once.
    pub fn validate(&self, declarations: &[&Declaration]) -> Result {
        let fault_of = |d: &&Declaration| match self.environment.parameter(d.name).or(d.default) {
            None if d.required => Some(format!("parameter {} is not set", d.name)),
            None => None,
            Some(raw) => d.fault(raw).map(|fault| format!("parameter {} {fault}", d.name)),
        };
        let faults: Vec<String> = declarations.iter().filter_map(fault_of).collect();
        if faults.is_empty() { Ok(()) } else { Err(Failure::configured(faults.join("; "))) }
    }
}

fn wrong(declaration: &Declaration, fault: &str) -> Failure {
    Failure::configured(format!("parameter {} {fault}", declaration.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    static NAME: Param<String> = Param::text("name").required();
    static SIZE: Param<u64> = Param::integer("size", 1, 64).default("4");
    static WAIT: Param<Duration> = Param::time("wait").default("1500ms");
    static FAST: Param<bool> = Param::boolean("fast").default("no");
    static MODE: Param<String> = Param::choice("mode", &["a", "b"]);

    fn given(pairs: &[(&str, &str)]) -> Parameters {
        Parameters::new(Environment::from_pairs(pairs.iter().map(|(k, v)| (format!("OCF_RESKEY_{k}"), *v))))
    }

    #[test]
    fn defaults_stand_in_for_what_is_not_set() {
        let p = given(&[]);
        assert_eq!(p.get(&SIZE), Ok(4));
        assert_eq!(p.get(&WAIT), Ok(Duration::from_millis(1500)));
        assert_eq!(p.get(&FAST), Ok(false));
        assert_eq!(p.find(&MODE), Ok(None));
        assert_eq!(p.get(&NAME).unwrap_err().code, crate::ExitCode::Configured);
    }

    #[test]
    fn a_wrong_value_is_a_sentence_that_names_it() {
        let p = given(&[("size", "65"), ("mode", "c"), ("fast", "maybe"), ("wait", "3 weeks")]);
        assert_eq!(p.get(&SIZE).unwrap_err().reason, "parameter size is 65, which is not between 1 and 64");
        assert_eq!(p.find(&MODE).unwrap_err().reason, "parameter mode is \"c\", which is not one of a, b");
        assert!(p.get(&FAST).unwrap_err().reason.contains("neither true nor false"));
        assert!(p.get(&WAIT).unwrap_err().reason.contains("not a time"));
    }

    #[test]
    fn one_wrong_parameter_does_not_hide_the_others() {
        let p = given(&[("name", "x"), ("size", "many")]);
        assert_eq!(p.get(&NAME).as_deref(), Ok("x"));
        let all = [NAME.declaration(), SIZE.declaration(), MODE.declaration()];
        assert!(p.validate(&all).unwrap_err().reason.contains("size"));
        let both = given(&[("size", "0")]).validate(&all).unwrap_err().reason;
        assert!(both.contains("name is not set") && both.contains("size is 0"), "{both}");
    }

    #[test]
    fn times_are_read_as_pacemaker_writes_them() {
        for (text, ms) in
            [("5", 5000), ("5s", 5000), ("5 sec", 5000), ("250ms", 250), ("2min", 120_000), ("1h", 3_600_000)]
        {
            assert_eq!(parse_time(text), Some(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "-1", "1.5s", "5 days", "99999999999999999999"] {
            assert_eq!(parse_time(text), None, "{text}");
        }
    }
}
