//! Unix seconds to the Gregorian calendar and back, as far as a CMOS clock needs it.

/// A date and a time of day, UTC. Made by a guest it may hold anything; [`DateTime::to_unix`] takes it as an offset
/// from the start of its month, as a real clock runs on from whatever it was set to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DateTime {
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}

const DAYS_BEFORE_MONTH: [i64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

/// Days from 1970-01-01 to the first of January of `year` (1 or later).
fn days_before_year(year: i64) -> i64 {
    let leaps = |y: i64| y / 4 - y / 100 + y / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

fn days_before_month(year: i64, month: u8) -> i64 {
    let month = month.clamp(1, 12);
    DAYS_BEFORE_MONTH[usize::from(month - 1)] + i64::from(month > 2 && is_leap(year))
}

impl DateTime {
    /// The calendar date of `unix` seconds; times outside 1970 … 9999 are taken as the nearest end.
    pub fn from_unix(unix: i64) -> Self {
        let unix = unix.clamp(0, days_before_year(10_000) * 86_400 - 1);
        let (days, second) = (unix / 86_400, unix % 86_400);
        // A year has at least 365 days, so this is right or too late.
        let mut year = 1970 + days / 365;
        while days_before_year(year) > days {
            year -= 1;
        }
        let day_of_year = days - days_before_year(year);
        let month = (1..=12).rev().find(|m| days_before_month(year, *m) <= day_of_year).unwrap_or(1);
        // The casts cannot truncate: each value is reduced to its range above or by the remainder.
        Self {
            year: year as u16,
            month,
            day: (day_of_year - days_before_month(year, month) + 1) as u8,
            hour: (second / 3600) as u8,
            minute: (second / 60 % 60) as u8,
            second: (second % 60) as u8,
        }
    }

    /// Seconds since 1970.
    pub fn to_unix(self) -> i64 {
        let year = i64::from(self.year).max(1);
        let days = days_before_year(year) + days_before_month(year, self.month) + i64::from(self.day) - 1;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    /// 0 = Sunday.
    pub fn weekday(self) -> u8 {
        // 1970-01-01 was a Thursday.
        (self.to_unix().div_euclid(86_400) + 4).rem_euclid(7) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        // `date -u -d @N`
        for (unix, y, mo, d, h, mi, s, weekday) in [
            (0, 1970, 1, 1, 0, 0, 0, 4),
            (951_782_399, 2000, 2, 28, 23, 59, 59, 1),
            (951_782_400, 2000, 2, 29, 0, 0, 0, 2),
            (951_868_800, 2000, 3, 1, 0, 0, 0, 3),
            (1_735_689_599, 2024, 12, 31, 23, 59, 59, 2),
            (1_795_347_129, 2026, 11, 22, 11, 32, 9, 0),
            (4_107_542_400, 2100, 3, 1, 0, 0, 0, 1),
        ] {
            let at = DateTime::from_unix(unix);
            assert_eq!(at, DateTime { year: y, month: mo, day: d, hour: h, minute: mi, second: s }, "{unix}");
            assert_eq!(at.to_unix(), unix);
            assert_eq!(at.weekday(), weekday, "{unix}");
        }
    }

    #[test]
    fn every_day_of_four_centuries_goes_there_and_back() {
        for day in 0..146_097 {
            assert_eq!(DateTime::from_unix(day * 86_400 + 5).to_unix(), day * 86_400 + 5);
        }
    }

    #[test]
    fn nonsense_is_survived() {
        for unix in [i64::MIN, -1, i64::MAX] {
            DateTime::from_unix(unix).weekday();
        }
        let nonsense = DateTime { year: 0, month: 0, day: 0, hour: 255, minute: 255, second: 255 };
        nonsense.to_unix();
        nonsense.weekday();
    }
}
